"""What a GPU kernel costs, from the assembler itself and without a GPU.

The CUDA plugin compiles ahead of time for a device that is only described, and ptxas says which
registers and shared memory a kernel takes.

archs     public facts of devices
compiler  one compile, and what ptxas and the disassembler say of its kernels
report    a table for people, records for programs
"""
