"""What can go wrong, said in one line each.

::

    LensError                 anything a user can mend; exit code 2 on the command line
    ├── RunError              a recording that cannot be opened, read or written
    ├── AttachError           a recorder that cannot be attached to this model and optimizer
    └── MissingExtra          an optional dependency that is not installed; an ImportError too

A message names what and where, what was expected, and what to do.
"""


class LensError(Exception):
    """Base of every error that normuon-lens raises for something the user can mend."""


class RunError(LensError):
    """A recording that is missing, damaged, foreign, or cannot be written."""


class AttachError(LensError):
    """A recorder cannot be attached to this model and optimizer."""


class MissingExtra(LensError, ImportError):
    """An optional dependency is not installed; the message names what installs it."""
