"""The CPU library that NumPy, torch and XLA share: everything works on NumPy arrays.

``runtime`` has threads, memory and the loading of compiled loops; ``serve`` says which form serves what. The forms:
``quantize`` (and dequantize), ``encoders`` and ``decoders`` (codes and values by loops), ``floats`` (products in
float32), ``integers`` (exact products), ``fixed_point`` (products of floats made of exact ones). ``loops``,
``encoding`` and ``dots`` are what numba compiles, ``kernels`` is NumPy's table.
"""
