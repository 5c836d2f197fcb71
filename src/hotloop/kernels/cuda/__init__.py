"""Our decode kernels for NVIDIA GPUs: CUDA C++, compiled by NVRTC, launched through cuda-bindings.

``*.cu`` hold the arithmetic, ``packing`` arranges weights as it is read, ``linear``, ``attention``,
``step`` and ``sample`` say how each kernel is launched for given shapes (``Call``), ``compile``
makes machine code of it, ``launch`` runs it. Everything up to ``launch`` works, and is tested,
without a GPU.

``kernels.reference`` specifies every kernel but ``sample``'s, which ``engine.sampling`` does.
"""
