"""Functions for other processors, compiled by the LLVM that numba has; those for Arm run in an emulated one."""

from __future__ import annotations

import struct

import numpy as np

PAGE = 1 << 12
CODE, STACK, RETURN = 1 << 20, 1 << 24, 1 << 25


def compiled(generate, count, triple, cpu, features):
    """A function of ``count`` integers of 64 bits, its body by ``generate(builder, arguments)``; and the machine."""
    from llvmlite import binding, ir

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module, word = ir.Module(), ir.IntType(64)
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [word] * count), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    generate(builder, function.args)
    builder.ret_void()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
    return binding.parse_assembly(str(module)), machine


def assembly(generate, count, triple, cpu, features):
    """What it becomes, as text."""
    module, machine = compiled(generate, count, triple, cpu, features)
    return machine.emit_assembly(module)


def arm_code(generate, count):
    """Its machine code for an Arm processor with dot products."""
    module, machine = compiled(generate, count, "aarch64-unknown-linux-gnu", "generic", "+neon,+dotprod")
    return sections(machine.emit_object(module))[".text"]


def sections(elf):
    """Contents of an object file by their names; what would have to be linked is refused."""
    (start,), (size, count, names) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, offset, length in headers:
        at = headers[names][4] + name
        found[elf[at : elf.index(b"\0", at)].decode()] = elf[offset : offset + length]
    assert not any(name.startswith(".rela.text") for name in found), sorted(found)
    return found


def run_on_arm(code, *arguments):
    """Call ``code``; arrays among the arguments are passed by their address, and changed as the code changes them."""
    import unicorn
    from unicorn import arm64_const as registers

    processor = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    processor.ctl_set_cpu_model(registers.UC_CPU_ARM64_MAX)
    processor.mem_map(CODE, -(-len(code) // PAGE) * PAGE)
    processor.mem_write(CODE, code)
    processor.mem_map(STACK, 16 * PAGE)
    processor.reg_write(registers.UC_ARM64_REG_SP, STACK + 8 * PAGE)
    processor.mem_map(RETURN, PAGE)
    processor.reg_write(registers.UC_ARM64_REG_LR, RETURN)
    processor.reg_write(registers.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # vectors are switched on
    places, address = [], 1 << 32
    for i, value in zip(range(8), arguments, strict=False):
        if isinstance(value, np.ndarray):
            processor.mem_map(address, (-(-value.nbytes // PAGE) + 1) * PAGE)
            processor.mem_write(address, value.tobytes())
            places.append((address, value))
            value, address = address, address + (1 << 28)
        processor.reg_write(getattr(registers, f"UC_ARM64_REG_X{i}"), int(value) & (2**64 - 1))
    processor.emu_start(CODE, RETURN)
    for address, value in places:
        value[...] = np.frombuffer(processor.mem_read(address, value.nbytes), value.dtype).reshape(value.shape)
