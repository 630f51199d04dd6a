"""A stand-in for the Ascend runtime: torch_npu's own code runs on it, without CANN and without an NPU.

    wheel.py        torch_npu, as its makers publish it, in a folder of its own
    libraries.py    libascendcl.so and the others it links, generated for that wheel with nm and gcc
    runtime/        what of the runtime has to work, in C: memory, streams, events, graphs, collectives
    environment.py  the environment in which a Python process finds both
    site/           what such a process does at its start
    import_hook.py  `import torch_npu` there: libraries before it, arithmetic after it
    loading.py      loads the libraries, counts launches
    arithmetic.py   lets torch's CPU kernels and reference/ compute what the operators would have computed
    reference/      the npu:: operators, written from their descriptions

scripts/npu_sim.py is the command; tests/npu_sim/README.md says what a run on it proves and what not.
"""
