"""Instructions that nvcc rarely emits, as hand-written PTX."""

import itertools
import math
import struct

import numpy as np
import ptxsim
import pytest

HEADER = """.version 9.0
.target sm_90
.address_size 64
"""


def run(body, inputs, outputs, threads=1, declarations="", **options):
    """Runs `body` with %in/%out pointing to the arrays and %i = thread index."""
    text = f"""{HEADER}{declarations}
.visible .entry test(.param .u64 p_in, .param .u64 p_out)
{{
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<9>; .reg .b64 %d<40>;
  .reg .b64 %in, %out; .reg .b32 %i;
  ld.param.u64 %in, [p_in];
  ld.param.u64 %out, [p_out];
  mov.u32 %i, %tid.x;
{body}
  ret;
}}
"""
    return ptxsim.Simulator(text).launch("test", 1, threads, [inputs, outputs], **options)


def unary(instruction, value, dtype=np.uint32):
    """Result bits of a one-operand f32 -> b32 instruction."""
    out = np.zeros(1, dtype)
    register = {2: "%h1", 4: "%r1", 8: "%d1"}[out.itemsize]
    store = f"st.global.b{out.itemsize * 8} [%out], {register};"
    body = f"ld.global.f32 %f1, [%in]; {instruction}; {store}"
    run(body, np.array([value], np.float32), out)
    return out[0]


def test_add_with_carry():
    a = np.array([2**64 - 1, 5, 7, 2**64 - 5, 2**63, 1], np.uint64)
    out = np.zeros(5, np.uint64)
    body = "".join(f"ld.global.u64 %d{n}, [%in+{8 * n}];" for n in range(6))
    body += """
      add.cc.u64 %d10, %d0, %d3; addc.cc.u64 %d11, %d1, %d4; addc.u64 %d12, %d2, %d5;
      sub.cc.u64 %d13, %d3, %d0; subc.u64 %d14, %d4, %d1;
    """
    body += "".join(f"st.global.u64 [%out+{8 * n}], %d{10 + n};" for n in range(5))
    run(body, a, out)
    x = sum(int(v) << 64 * n for n, v in enumerate(a[:3]))
    y = sum(int(v) << 64 * n for n, v in enumerate(a[3:]))
    total = sum(int(v) << 64 * n for n, v in enumerate(out[:3]))
    assert total == (x + y) % 2**192
    difference = int(out[3]) | int(out[4]) << 64
    assert difference == ((int(a[3]) | int(a[4]) << 64) - (int(a[0]) | int(a[1]) << 64)) % 2**128


def test_multiply_with_carry():
    a, b = 0xFEDCBA9876543210, 0x123456789ABCDEF1
    words = np.array([a & 0xFFFFFFFF, a >> 32, b & 0xFFFFFFFF, b >> 32], np.uint32)
    out = np.zeros(4, np.uint32)
    body = "".join(f"ld.global.u32 %r{n}, [%in+{4 * n}];" for n in range(4))
    body += """
      mul.lo.u32 %r10, %r0, %r2; mul.hi.u32 %r11, %r0, %r2;
      mad.lo.cc.u32 %r11, %r1, %r2, %r11; madc.hi.u32 %r12, %r1, %r2, 0;
      mad.lo.cc.u32 %r11, %r0, %r3, %r11; madc.hi.cc.u32 %r12, %r0, %r3, %r12;
      addc.u32 %r13, 0, 0;
      mad.lo.cc.u32 %r12, %r1, %r3, %r12; madc.hi.u32 %r13, %r1, %r3, %r13;
    """
    body += "".join(f"st.global.u32 [%out+{4 * n}], %r{10 + n};" for n in range(4))
    run(body, words, out)
    assert sum(int(v) << 32 * n for n, v in enumerate(out)) == a * b


def test_indexed_branch():
    values, out = np.array([2, 0, 1, 1], np.int32), np.zeros(4, np.int32)
    body = """
      mul.wide.u32 %d1, %i, 4; add.u64 %d2, %in, %d1; add.u64 %d3, %out, %d1;
      ld.global.u32 %r1, [%d2];
      targets: .branchtargets A, B, C;
      brx.idx %r1, targets;
    A: mov.u32 %r2, 10; bra.uni END;
    B: mov.u32 %r2, 20; bra.uni END;
    C: mov.u32 %r2, 30;
    END: st.global.u32 [%d3], %r2;
    """
    run(body, values, out, threads=4)
    assert out.tolist() == [30, 10, 20, 20]
    values[1] = 3
    with pytest.raises(ptxsim.KernelError, match="index out of range"):
        run(body, values, out, threads=4)


@pytest.mark.parametrize(
    "kind, true_for",
    [("finite", [1.0, 1e-40, 0.0]), ("infinite", [math.inf]), ("normal", [1.0]),
     ("notanumber", [math.nan]), ("number", [1.0, 1e-40, 0.0, math.inf]), ("subnormal", [1e-40])],
)  # fmt: skip
def test_testp(kind, true_for):
    for value in (1.0, 1e-40, 0.0, math.inf, math.nan):
        found = unary(f"testp.{kind}.f32 %p1, %f1; selp.u32 %r1, 1, 0, %p1", value)
        assert found == any(value == t or (value != value and t != t) for t in true_for)


def test_rounding_modes():
    x, results = np.float32(1 / 3), {}
    for mode in ("rn", "rz", "rm", "rp"):
        bits = unary(f"add.{mode}.f32 %f2, %f1, 0f3F800000; mov.b32 %r1, %f2", x)
        results[mode] = struct.unpack("f", struct.pack("I", bits))[0]
    exact = float(x) + 1
    assert results["rm"] == results["rz"] < exact < results["rp"]
    assert results["rn"] == np.float32(exact)


def test_conversions_from_f32():
    pytest.importorskip("ml_dtypes")
    import ml_dtypes

    specials = [
        0.0,
        -0.0,
        1.0,
        -2.5,
        65504.0,
        65519.9,
        65520.0,
        1e-8,
        6e-8,
        math.inf,
        3.4e38,
        1e-40,
    ]
    for v in specials:
        x = np.float32(v)
        with np.errstate(over="ignore"):
            f16 = x.astype(np.float16).view(np.uint16)
        assert unary("cvt.rn.f16.f32 %h1, %f1", v, np.uint16) == f16
        bf16 = x.astype(ml_dtypes.bfloat16).view(np.uint16)
        assert unary("cvt.rn.bf16.f32 %h1, %f1", v, np.uint16) == bf16
    assert unary("cvt.rzi.s32.f32 %r1, %f1", -2.9, np.int32) == -2
    assert unary("cvt.rni.s32.f32 %r1, %f1", 2.5, np.int32) == 2
    assert unary("cvt.rzi.u32.f32 %r1, %f1", -5.0) == 0
    assert unary("cvt.rzi.s32.f32 %r1, %f1", 3e9, np.int32) == 2**31 - 1
    assert unary("cvt.rzi.s32.f32 %r1, %f1", math.nan, np.int32) == 0
    assert unary("cvt.rn.relu.bf16.f32 %h1, %f1", -3.0, np.uint16) == 0
    assert unary("cvt.sat.f32.f32 %f2, %f1; mov.b32 %r1, %f2", 7.0) == 0x3F800000
    assert unary("cvt.rz.f16.f32 %h1, %f1", 65519.9, np.uint16) == 0x7BFF


def test_bf16_fma_rounds_once(rng):
    """Against exact rational arithmetic, with addends far below the product."""
    from fractions import Fraction

    ml_dtypes = pytest.importorskip("ml_dtypes")
    n = 512
    mantissas = rng.integers(128, 256, (n, 3))
    exponents = np.stack(
        [rng.integers(-6, 6, n), rng.integers(-6, 6, n), rng.integers(-90, 8, n)], 1
    )
    signs = rng.choice([-1, 1], (n, 3))
    x = np.ldexp((mantissas * signs).astype(np.float64), exponents - 7).astype(ml_dtypes.bfloat16)
    out = np.zeros(n, ml_dtypes.bfloat16)
    body = """
      mul.wide.u32 %d1, %i, 6; add.u64 %d2, %in, %d1; mul.wide.u32 %d1, %i, 2;
      add.u64 %d3, %out, %d1;
      ld.global.b16 %h1, [%d2]; ld.global.b16 %h2, [%d2+2]; ld.global.b16 %h3, [%d2+4];
      fma.rn.bf16 %h4, %h1, %h2, %h3; st.global.b16 [%d3], %h4;
    """
    run(body, x, out, threads=n)

    def rounded(value):
        if not value:
            return 0.0
        exponent = math.frexp(float(value))[1] - 8
        scaled = value / Fraction(2) ** exponent
        if abs(scaled) >= 256:
            exponent, scaled = exponent + 1, scaled / 2
        return math.ldexp(round(scaled), exponent)  # Fraction rounds half to even

    for row, found in zip(x, out, strict=True):
        a, b, c = (Fraction(float(v)) for v in row)
        assert float(found) == rounded(a * b + c)


def test_packed_f32():
    a, out = np.array([1.5, 2.0, 3.0, -4.0, 0.5, 0.25], np.float32), np.zeros(2, np.float32)
    body = """
      ld.global.b64 %d1, [%in]; ld.global.b64 %d2, [%in+8]; ld.global.b64 %d3, [%in+16];
      fma.rn.f32x2 %d4, %d1, %d2, %d3; st.global.b64 [%out], %d4;
    """
    run(body, a, out)
    assert out.tolist() == [5.0, -7.75]


def test_bit_operations():
    a = np.array([0x12345678, 0x9ABCDEF0, 0xF0], np.uint32)
    out = np.zeros(12, np.uint32)
    operations = [
        "bfe.u32 %r10, %r0, 8, 12", "bfe.s32 %r11, %r1, 28, 4", "bfi.b32 %r12, %r2, %r0, 4, 8",
        "bmsk.clamp.b32 %r13, 4, 8", "bmsk.clamp.b32 %r14, 28, 8", "szext.clamp.s32 %r15, %r2, 8",
        "szext.wrap.u32 %r16, %r0, 12", "lop3.b32 %r17, %r0, %r1, %r2, 0x96",
        "shf.l.clamp.b32 %r18, %r0, %r1, 40", "shf.r.wrap.b32 %r19, %r0, %r1, 36",
        "bfind.shiftamt.u32 %r20, %r2", "cnot.b32 %r21, 0",
    ]  # fmt: skip
    body = "".join(f"ld.global.u32 %r{n}, [%in+{4 * n}];" for n in range(3))
    body += ";\n".join(operations) + ";\n"
    body += "".join(f"st.global.u32 [%out+{4 * n}], %r{10 + n};" for n in range(12))
    run(body, a, out)
    x, y, z = (int(v) for v in a)
    assert [int(v) for v in out] == [
        x >> 8 & 0xFFF, 0xFFFFFFF9, (x & ~0xFF0) | (z & 0xFF) << 4, 0xFF0, 0xF0000000, 0xFFFFFFF0,
        x & 0xFFF, x ^ y ^ z, x, (y << 28 | x >> 4) & 0xFFFFFFFF, 24, 1,
    ]  # fmt: skip


def test_shuffle_modes():
    """All modes with 8-lane segments, against the definition."""
    out = np.zeros((4, 32), np.uint32)
    body = "mul.wide.u32 %d1, %i, 4; add.u64 %d2, %out, %d1;\n"
    for n, (mode, c) in enumerate(
        (("up", 0x1800), ("down", 0x181F), ("bfly", 0x181F), ("idx", 0x181F))
    ):
        body += f"shfl.sync.{mode}.b32 %r1|%p1, %i, 3, {c}, -1; selp.u32 %r2, 100, 0, %p1;\n"
        body += f"add.u32 %r1, %r1, %r2; st.global.u32 [%d2+{128 * n}], %r1;\n"
    run(body, out, out, threads=32)
    for lane in range(32):
        segment = lane // 8 * 8
        up = lane - 3 if lane - 3 >= segment else None
        down = lane + 3 if lane + 3 < segment + 8 else None
        sources = [up, down, lane ^ 3, segment + 3]
        expected = [lane if s is None else s + 100 for s in sources]
        assert out[:, lane].tolist() == expected


def test_named_barriers():
    """Two pairs of warps synchronise on their own barriers; producers only arrive."""
    x, out = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    declarations = ".shared .align 4 .b8 box[512];"
    body = """
      mul.wide.u32 %d1, %i, 4; add.u64 %d2, %in, %d1; add.u64 %d3, %out, %d1;
      mov.u32 %r5, box; shl.b32 %r1, %i, 2; add.u32 %r1, %r5, %r1;
      and.b32 %r2, %i, 32; setp.ne.u32 %p1, %r2, 0; shr.u32 %r3, %i, 6; add.u32 %r3, %r3, 1;
      @%p1 bra CONSUMER;
      ld.global.u32 %r4, [%d2]; st.shared.u32 [%r1], %r4;
      barrier.cta.arrive %r3, 64;
      bra END;
    CONSUMER:
      barrier.cta.sync %r3, 64;
      ld.shared.u32 %r4, [%r1+-128]; st.global.u32 [%d3], %r4;
    END:
    """
    for seed in (0, 1, 2):
        out[:] = 0
        run(body, x, out, threads=128, declarations=declarations, seed=seed)
        assert out.tolist() == [v - 32 if v // 32 % 2 else 0 for v in range(128)]


def test_match_all_elect_and_vote():
    x, out = np.full(32, 9, np.int32), np.zeros((4, 32), np.uint32)
    body = """
      mul.wide.u32 %d1, %i, 4; add.u64 %d2, %in, %d1; add.u64 %d3, %out, %d1;
      ld.global.u32 %r1, [%d2];
      match.all.sync.b32 %r2|%p1, %r1, -1; st.global.u32 [%d3], %r2;
      elect.sync %r3|%p2, -1; selp.u32 %r4, 1, 0, %p2; st.global.u32 [%d3+128], %r4;
      setp.lt.u32 %p3, %i, 5; vote.sync.ballot.b32 %r5, %p3, -1; st.global.u32 [%d3+256], %r5;
      vote.sync.uni.pred %p4, %p3, -1; selp.u32 %r6, 1, 0, %p4; st.global.u32 [%d3+384], %r6;
    """
    run(body, x, out, threads=32)
    assert (out[0] == 0xFFFFFFFF).all() and out[1].tolist() == [1] + [0] * 31
    assert (out[2] == 31).all() and (out[3] == 0).all()
    x[4] = 1
    run(body, x, out, threads=32)
    assert (out[0] == 0).all()


def test_comparisons_with_nan():
    values = (1.0, 2.0, math.nan)
    for operator, (a, b) in itertools.product(
        ("lt", "ne", "neu", "geu", "num", "nan"), itertools.product(values, values)
    ):
        out = np.zeros(1, np.uint32)
        body = f"""ld.global.f32 %f1, [%in]; ld.global.f32 %f2, [%in+4];
          setp.{operator}.f32 %p1, %f1, %f2; selp.u32 %r1, 1, 0, %p1; st.global.u32 [%out], %r1;"""
        run(body, np.array([a, b], np.float32), out)
        unordered = a != a or b != b
        expected = {
            "lt": a < b, "ne": not unordered and a != b, "neu": unordered or a != b,
            "geu": unordered or a >= b, "num": not unordered, "nan": unordered,
        }[operator]  # fmt: skip
        assert out[0] == expected, (operator, a, b)
