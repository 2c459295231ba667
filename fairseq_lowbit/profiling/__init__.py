"""What a model costs: storage, floating-point and integer operations, runtime, memory."""

from fairseq_lowbit.profiling.cost import Cost, Profile, profile

__all__ = ["Cost", "Profile", "profile"]
