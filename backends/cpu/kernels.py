"""NumPy's kernels: the operations that the CPU library has a faster form of.

Owns: the table. Imports: the forms.
"""

from __future__ import annotations

from aqt_lite import significant
from aqt_lite._kernels import Kernel, Kernels, anything
from aqt_lite.backends.cpu import quantize
from aqt_lite.backends.cpu.fixed_point import (
    fixed_point_matmul,
    matmul_reproducible,
    matmul_reproducible_stored,
    reproducible_of_weight,
    reproducible_stored_of_weight,
)
from aqt_lite.backends.cpu.floats import matmul, of_weight
from aqt_lite.backends.cpu.integers import integer_matmul
from aqt_lite.backends.cpu.rows import in_integers
from aqt_lite.backends.cpu.runtime import gated, gated_of_weight
from aqt_lite.backends.cpu.significant import bitrounded
from aqt_lite.backends.cpu.stored import matmul_stored, stored_of_weight
from aqt_lite.ops import reference

KERNELS: Kernels = {
    **{operation: Kernel(gated(form), anything) for operation, form in quantize.FORMS.items()},
    **{operation: Kernel(form, anything) for operation, form in quantize.INTO.items()},
    significant.bitrounded: Kernel(gated(bitrounded), anything),
    reference.matmul: Kernel(gated(matmul), of_weight=gated_of_weight(of_weight)),
    reference.matmul_stored: Kernel(gated(matmul_stored), anything, gated_of_weight(stored_of_weight)),
    reference.matmul_reproducible: Kernel(
        gated(matmul_reproducible), of_weight=gated_of_weight(reproducible_of_weight)
    ),
    reference.matmul_reproducible_stored: Kernel(
        gated(matmul_reproducible_stored), anything, gated_of_weight(reproducible_stored_of_weight)
    ),
    reference.in_integers: Kernel(gated(in_integers), anything),
    reference.integer_matmul: Kernel(gated(integer_matmul), anything),
    reference.fixed_point_matmul: Kernel(gated(fixed_point_matmul), anything),
}
