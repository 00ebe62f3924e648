"""The ways the plugin ends a run on purpose."""


class UserError(Exception):
    """Bad input. The message is one line that names the value and the remedy; the CLI prints it and exits with 2."""


class CreditError(RuntimeError):
    """Credit was asked for and cannot be recovered or attached. Ends the run: sparse reward is never a fallback."""


class NotFinite(CreditError):
    """A loss, value, reward or coefficient is NaN or infinite: whatever is trained on it is lost."""


class CannotWrite(RuntimeError):
    """A file of the run cannot be written; the message names it, the cause and what is kept."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers end a job: the same as Ctrl-C, with an exit status of its own."""

    status = 143


class WorkerDied(RuntimeError):
    """A process of a Ray cluster is gone; the message says how to go on."""


def first_line(error: object) -> str:
    """What an error says, in one line for a message: the first, or the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
