"""The errors that a user can cause; each message says what was wrong and what to do."""


class S6Error(Exception):
    """Base class of the errors that a user can cause."""

    def _render_traceback_(self) -> list[str]:
        """Show one sentence in a notebook, without the traceback above it (a hook of IPython)."""
        return [f"{type(self).__name__}: {self}"]


class StudyError(S6Error):
    """A request that cannot be met."""


class SettingError(StudyError, ValueError):
    """An invalid setting of a recipe, a condition or a table, or user code that cannot train."""


class DataError(S6Error):
    """A missing, damaged or unsuitable data set; the message says what to do."""


class RunError(S6Error):
    """A run that cannot continue; the message names condition, seed and cause."""


class RunsFailed(S6Error):
    """Some runs of a study failed, each named in the message; the others are complete."""


class DamagedFile(S6Error):
    """The content of a file does not match its checksum."""


class Stopped(KeyboardInterrupt):
    """A study that was interrupted, by Ctrl-C or a notebook's Stop; the message says how to continue."""

    _render_traceback_ = S6Error._render_traceback_
