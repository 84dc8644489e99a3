"""The run file: one recording of one optimizer in one training.

A recording at ``runs/x.h5`` has two states and one path. While it is made (or after a crash)
it lies in ``runs/x.h5.parts/`` as immutable HDF5 *segments* listed in a small ``manifest.json``;
once closed it is one ordinary HDF5 file. :func:`open_run` reads either, or both. Of a training on
several ranks each one writes segments of its own, and they are read as one run.

NumPy and h5py only: a run must be readable on a laptop without torch.
"""

from normuon_lens.runfile.reader import Run, Spectra, find_runs, open_run
from normuon_lens.runfile.schema import STAGES, Event, Matrices, Matrix, Shard
from normuon_lens.runfile.source import Hole
from normuon_lens.runfile.synthetic import made_up_run
from normuon_lens.runfile.writer import Writer

__all__ = [
    "STAGES",
    "Event",
    "Hole",
    "Matrices",
    "Matrix",
    "Run",
    "Shard",
    "Spectra",
    "Writer",
    "find_runs",
    "made_up_run",
    "open_run",
]
