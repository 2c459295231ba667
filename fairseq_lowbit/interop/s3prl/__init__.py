"""Importing this registers our upstream ``lowbit`` in s3prl, for ``S3PRLUpstream("lowbit", CKPT)``.

Raises:
    LowbitError: s3prl is not installed, or lacks a package that it needs.
"""

from fairseq_lowbit.interop.s3prl.registration import NAME, lowbit, register
from fairseq_lowbit.interop.s3prl.upstream import LowbitUpstream

register()

__all__ = ["NAME", "LowbitUpstream", "lowbit"]
