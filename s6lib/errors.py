"""What a user can cause: every such error is an S6Error, and its message names what was wrong and what to do."""


class S6Error(Exception):
    """The base of the errors that a user can cause."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: one sentence, which a traceback would push off the screen (IPython's hook)."""
        return [f"{type(self).__name__}: {self}"]


class StudyError(S6Error):
    """A request that cannot be met."""


class SettingError(StudyError, ValueError):
    """A setting of a recipe, a condition or a table that makes no sense, or code of the user's that cannot train."""


class RunError(S6Error):
    """A run that cannot go on; the message names condition, seed, and the cause."""


class RunsFailed(S6Error):
    """Some runs of a study failed, each named in the message; the others are complete."""


class DamagedFile(S6Error):
    """The content of a file does not match its checksum."""


class Stopped(KeyboardInterrupt):
    """A study that was interrupted, by Ctrl-C or a notebook's Stop; the message says how to go on."""

    def _render_traceback_(self) -> list[str]:
        return [f"Stopped: {self}"]
