"""What a TPU kernel costs, from the compiler's own schedule and without a TPU.

libtpu compiles Pallas kernels ahead of time for a named topology and dumps their VLIW schedule.
The vector units of that schedule need no data to be counted, and the scalar unit, which decides
where the program goes, needs only lengths and tables: so its few instructions are carried out on
the inputs of a case, and every bundle the kernel would run is counted.

chips     clock, bandwidth and peak of each generation
program   the function, shapes and runs of a case
operands  what each kernel of a program is given, evaluated without running a kernel
worker    one compile, in a process of its own
dump      the files a compile leaves: bundles, slots used, memory allocated
scalar    instructions of the scalar unit as Python
machine   a kernel's way through its bundles
paths     loops, their iterations, and the way most of them take
figures   cycles per KiB, ratio, spills, share of peak
report    a table for people

Cycles are bundles of the scheduler's timeline, with its gaps for latency.  It knows nothing of
waits for copies, bank conflicts or instruction fetch: a ratio below 1 says that arithmetic can
hide behind memory, not that it does.
"""
