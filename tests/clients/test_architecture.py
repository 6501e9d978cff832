"""What configurations say of their text decoders: real configuration classes, with the numbers of published checkpoints where they matter."""

from types import SimpleNamespace

import pytest
from transformers import CONFIG_MAPPING

from slm_swap.clients.architecture import config_ends, context_length, fixed_length, text_config, usable_context
from slm_swap.common.errors import UserError

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


def config(model_type: str, **given):
    return CONFIG_MAPPING[model_type](**given)


@pytest.mark.parametrize(
    ("made", "context"),
    [
        (config("llama", max_position_embeddings=8192), 8192),
        (config("gemma3", text_config={"max_position_embeddings": 131072}), 131072),
        (config("qwen3_5", text_config={"max_position_embeddings": 262144}), 262144),
        (config("mistral3", text_config={"model_type": "mistral", "max_position_embeddings": 40960}), 40960),
        (config("gpt2", n_positions=1024), 1024),
        (config("mpt", max_seq_len=2048), 2048),
        (config("mamba2"), None),
        (config("bloom"), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_context_is_the_text_decoders(made, context):
    assert context_length(made) == context


def test_without_a_context_the_tokenizers_counts_where_it_is_one():
    made = config("mamba2")
    assert usable_context(made, SimpleNamespace(model_max_length=8192)) == 8192
    assert usable_context(config("llama", max_position_embeddings=512), SimpleNamespace(model_max_length=int(1e30))) == 512
    with pytest.raises(UserError, match=r'mamba2 model says how many tokens it may read: put "max_position_embeddings" into its config\.json'):
        usable_context(made, SimpleNamespace(model_max_length=int(1e30)))
    assert usable_context(config("mamba2", max_position_embeddings=2048), SimpleNamespace(model_max_length=int(1e30))) == 2048


@pytest.mark.parametrize(
    ("made", "length"),
    [
        (config("llama"), None),
        (config("mistral", sliding_window=4096), 4096),
        (config("gemma3", text_config={"sliding_window": 1024}), 1024),
        (config("llama4_text", attention_chunk_size=8192), 8192),
        (config("gemma4_text", sliding_window=512), 512),
        (config("phi3", max_position_embeddings=131072, original_max_position_embeddings=4096, rope_parameters=LONGROPE), 4096),
        (config("phi3", max_position_embeddings=131072, sliding_window=2047, original_max_position_embeddings=4096, rope_parameters=LONGROPE), 2047),
        (config("llama", max_position_embeddings=2048, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), 2048),
        (config("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), None),
        (
            config(
                "olmo3",
                num_hidden_layers=2,
                layer_types=["sliding_attention", "full_attention"],
                sliding_window=8192,
                max_position_embeddings=65536,
                rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            ),
            8192,
        ),
        (
            config(
                "modernbert-decoder",
                max_position_embeddings=32,
                rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            ),
            32,
        ),
    ],
)  # fmt: skip
def test_up_to_where_a_decode_step_is_always_the_same(made, length):
    assert fixed_length(made) == length


def test_ends_are_those_of_both_parts():
    made = config("gemma3", text_config={"eos_token_id": 107}, eos_token_id=[1, 106])
    assert list(config_ends(made)) == [[1, 106], 107]
    assert text_config(made) is made.text_config and list(config_ends(config("llama", eos_token_id=5))) == [5, 5]
