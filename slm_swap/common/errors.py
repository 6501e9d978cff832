"""The one exception that means "the user can correct this": a single line, exit code 2."""


class UserError(Exception):
    """A mistake in the input or the set-up. The message is one line: what, where, what to do next."""
