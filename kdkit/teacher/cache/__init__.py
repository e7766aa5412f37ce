"""A teacher that was asked once: what it said of every row, in files that training reads instead of the model.

`manifest` says what a cache is of, `rows` which rows it holds and where, `keeping` what is kept of a signal, `shards`
writes and reads the files, `source` is the teacher that training asks, `checks` says whether a cache fits a run.
`kdkit.training.caching` fills one.
"""

from kdkit.teacher.cache.checks import cached_vocab_size, check_rows, open_fitting_cache
from kdkit.teacher.cache.source import CachedTeacher, TeacherCache, open_cache

__all__ = ["CachedTeacher", "TeacherCache", "cached_vocab_size", "check_rows", "open_cache", "open_fitting_cache"]
