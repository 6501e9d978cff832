"""Passes over the packs of optimizer steps, forward and backward, by CUDA graphs: each shape captured once and replayed.

A pass of two thousand tokens through a model of 32 layers is some 2,300 kernels, which a host launches more slowly than a fast GPU runs them. Imports torch:
import it inside functions.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from slm_swap.clients.loading import first_line

SPARE = 1.15  # of the memory that a pass keeps: what it takes besides for a moment
SPARE_BYTES = 2**30  # likewise, whatever its length: logits, weights turned to 16 bits

Pack = dict[str, Any]


class Gradients:
    """Gradients of a step that stay at one place: parts of one tensor for each type of number. Captured passes add to them there."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        kinds = {(parameter.dtype, parameter.device) for parameter in trained}
        self.whole, self.parts = [], []
        for dtype, device in sorted(kinds, key=str):
            members = [parameter for parameter in trained if (parameter.dtype, parameter.device) == (dtype, device)]
            self.whole.append(torch.zeros(sum(map(torch.Tensor.numel, members)), dtype=dtype, device=device))
            parts = self.whole[-1].split([parameter.numel() for parameter in members])
            self.parts += [(parameter, part.view_as(parameter)) for parameter, part in zip(members, parts, strict=True)]

    def begin(self) -> None:
        """All are 0, and the parameters' own again: a trainer takes them away after each step."""
        for whole in self.whole:
            whole.zero_()
        for parameter, part in self.parts:
            parameter.grad = part

    def average(self, ranks: int) -> None:
        """Their mean over all ranks of a launch."""
        for whole in self.whole:
            torch.distributed.all_reduce(whole)
            whole.div_(ranks)


class StepGraphs:
    """Passes over packs: the first of a shape as usual, which compiles what is to be compiled; the second is captured, and all further ones are replays.

    A replay's dropout draws from the generator's state at that time, as torch registers it with each graph. Where capturing fails, or memory for
    the longest pack twice is not free, all passes are launched as usual, which it says once.

    Args:
        forward: gives the loss, a scalar, of a pack and the number of the step's targets.
        backward: adds the loss' gradients to `Gradients`.
        room: tokens of the longest pack.
        on: off, nothing is captured. Capturing needs a stream that is not the default one.
    """

    def __init__(
        self,
        forward: Callable[[Pack, torch.Tensor], torch.Tensor],
        backward: Callable[[torch.Tensor], None],
        room: int,
        on: bool,
        say: Callable[[str], object],
    ):
        self.forward, self.backward, self.room, self.on, self.say = forward, backward, room, on, say
        self.graphs: dict[tuple, tuple[Any, Pack, torch.Tensor, torch.Tensor]] = {}  # with each graph its pack, count and loss
        self.seen: set[tuple] = set()
        self.bytes_a_token, self.pool = 0.0, None

    def __call__(self, pack: Pack, count: torch.Tensor) -> torch.Tensor:
        """The loss of a pack, whose gradients are then added."""
        shape = tuple(tuple(part.shape) if torch.is_tensor(part) else part for part in pack.values())
        if self.on and shape in self.seen and shape not in self.graphs:
            self._try(shape, pack, count)
        if shape not in self.graphs:
            if self.on and shape not in self.seen:
                torch.cuda.empty_cache()  # a longer pack's tensors fit into none of the pieces that shorter ones left, and all of them would be kept
            self.seen.add(shape)
            return self._pass(pack, count)
        graph, kept, kept_count, loss = self.graphs[shape]
        for name, part in kept.items():
            if torch.is_tensor(part):
                part.copy_(pack[name])
        kept_count.copy_(count)
        graph.replay()
        return loss

    def _pass(self, pack: Pack, count: torch.Tensor) -> torch.Tensor:
        cuda = pack["input_ids"].is_cuda
        before = torch.cuda.memory_allocated() if cuda else 0
        loss = self.forward(pack, count)
        if cuda:
            self.bytes_a_token = max(self.bytes_a_token, (torch.cuda.memory_allocated() - before) / pack["input_ids"].numel())
        self.backward(loss)
        return loss.detach()

    def _try(self, shape: tuple, pack: Pack, count: torch.Tensor) -> None:
        """Capture a shape's pass; or never again."""
        needed = int(SPARE * self.bytes_a_token * self.room) + SPARE_BYTES
        try:
            if self.graphs or self._memory_is_free(needed):
                self._capture(shape, pack, count, needed)
        except Exception as error:  # of any package: whatever a model does in its layers
            self.on = False
            self.say(f"steps are launched kernel by kernel, which is slower: they cannot be captured ({type(error).__name__}: {first_line(error)})")

    def _memory_is_free(self, needed: int) -> bool:
        """Whether it is, for a pass that is captured and one that is not."""
        torch.cuda.empty_cache()
        self.on = torch.cuda.mem_get_info()[0] > 2 * needed
        if not self.on:
            self.say(f"steps are launched kernel by kernel: for CUDA graphs {2 * needed / 2**30:.1f} GiB would have to be free")
        return self.on

    def _capture(self, shape: tuple, pack: Pack, count: torch.Tensor, needed: int) -> None:
        kept, kept_count = {name: part.clone() if torch.is_tensor(part) else part for name, part in pack.items()}, count.clone()
        graph, loss = self._record(lambda: self._pass(kept, kept_count), needed)
        self.graphs[shape] = (graph, kept, kept_count, loss)

    def _record(self, work: Callable[[], torch.Tensor], needed: int) -> tuple[Any, torch.Tensor]:
        """A graph of some work, which is not done yet, and the tensor that each replay writes."""
        stream, random = torch.cuda.current_stream(), torch.cuda.default_generators[torch.cuda.current_device()]
        before = random.clone_state()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            # The inner context does not leave its stream where capturing fails: this one does. Other threads, such as a loader's, may go on.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                if not self.graphs:
                    # Given back at once: all graphs take their memory out of this piece. Of pieces as they come, longer packs could not use those of shorter ones.
                    torch.empty(needed, dtype=torch.uint8, device="cuda")
                loss = work()
        except Exception:
            random.graphsafe_set_state(before)  # what failed left it in the state of capturing, in which earlier graphs have it, too
            self.graphs.clear()
            raise
        return graph, loss
