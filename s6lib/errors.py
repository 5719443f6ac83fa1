"""What a user can cause: every such error is an S6Error, and its message names what was wrong and what to do."""


class S6Error(Exception):
    """The base of the errors that a user can cause."""


class StudyError(S6Error):
    """A request that cannot be met."""


class RunError(S6Error):
    """A run that cannot go on; the message names condition, seed, and the cause."""


class RunsFailed(S6Error):
    """Some runs of a study failed, each named in the message; the others are complete."""


class DamagedFile(S6Error):
    """A file is not what was written."""
