"""Kernels for NVIDIA GPUs: CUDA C++, compiled by NVRTC, launched through cuda-bindings.

The ``*.cu`` files contain the kernels. ``packing`` arranges weights in the order in which kernels
read them. ``linear``, ``attention``, ``step``, ``sample``, ``prompt`` and ``dequantize`` determine
the launch of a kernel for given shapes (``Call``), and ``tuning`` chooses its parameters.
``compile`` compiles a kernel, and ``launch`` launches it. Everything but ``launch`` works, and is
tested, without a GPU.

``kernels.reference`` specifies every kernel but ``sample.cu``, which ``engine.sampling`` specifies.
"""
