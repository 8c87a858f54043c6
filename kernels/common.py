"""Small jit helpers shared by the kernels. Rows are tokens; every offset is int64 before it meets a stride."""

import triton
import triton.language as tl

from . import abi, tables

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(tables.LOG2E)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: a sum with it is an integer, in the low bits of the mantissa
HALF_PI = tl.constexpr(1.5707963267948966)

SEGMENT_FIELDS = tl.constexpr(len(abi.SEGMENT_COLUMNS))
(
    START, STOP, BUCKET_BASE, SCALED, WEIGHT, GROUP, GAIN, LOGIT_BIAS, FIRST_BLOCK, LAST_BLOCK, VARIANT,
    FIRST_OF_VARIANT, PASS_GROUP,
) = (tl.constexpr(column) for column in range(len(abi.SEGMENT_COLUMNS)))  # fmt: skip
GROUP_FIELDS = tl.constexpr(len(abi.GROUP_COLUMNS))
GROUP_BIAS, GROUP_DELTA, GROUP_COUNT = (tl.constexpr(column) for column in range(len(abi.GROUP_COLUMNS)))


@triton.jit
def when(condition, mask):
    """A block mask under a scalar condition (``&`` of the two breaks triton's interpreter)."""
    return tl.where(condition, mask, False)


@triton.jit
def load_tile(X, start, offs, valid, stride_s, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``X[start + offs, :]`` -> [offs, BLOCK_D]; the start of the tile is int64, offsets inside it are int32, which
    takes half the registers; launchers pack tensors whose heads span more."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = X + tl.cast(start, tl.int64) * stride_s + (offs[:, None] * stride_s + offs_d[None, :] * stride_d)
    if HEAD_DIM == BLOCK_D:
        return tl.load(ptrs, mask=valid[:, None], other=0.0)
    return tl.load(ptrs, mask=valid[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def stream_rows(X, X2, rows, split, stride_s, stride2_s):
    """Where rows begin in X, and in X2, which has those from ``split`` on: [rows, 1] pointers."""
    row = rows.to(tl.int64)
    return (X + row * stride_s)[:, None], (X2 + (row - split) * stride2_s)[:, None]


@triton.jit
def load_stream_members(
    ROWS, ROWS2, in_first, stride_d,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr, STREAMS: tl.constexpr,
):  # fmt: skip
    """:func:`load_members` of rows of two streams. Each is read under its own mask: of a pointer chosen between two
    the compiler knows no alignment, and reads one channel at a time."""
    if STREAMS:
        x, y = load_members(ROWS, in_first, stride_d, HEAD_DIM, BLOCK_D, INTERLEAVED)
        x2, y2 = load_members(ROWS2, in_first == 0, stride_d, HEAD_DIM, BLOCK_D, INTERLEAVED)
        x, y = tl.where(in_first, x, x2), tl.where(in_first, y, y2)
    else:
        x, y = load_members(ROWS, None, stride_d, HEAD_DIM, BLOCK_D, INTERLEAVED)
    return x, y


@triton.jit
def load_known(P, mask, known, ALL: tl.constexpr):
    """What ``P`` points at where ``mask`` [rows, 1] and ``known`` [1, channels] hold, zero elsewhere. ``mask`` may be
    None, and ALL says that ``known`` holds everywhere: a load without a mask needs no zeros beforehand."""
    if mask is None and ALL:
        x = tl.load(P)
    else:
        if mask is None:
            present = known
        elif ALL:
            present = mask
        else:
            present = mask & known
        x = tl.load(P, mask=present, other=0.0)
    return x


@triton.jit
def load_members(ROWS, mask, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """First and second members of the RoPE pairs of some rows, two [rows, BLOCK_D / 2] in the dtype of memory. ROWS
    points at the rows and is [rows, 1]; mask is the same, or None where all rows are there. Members that are not there
    are zero. Every channel is read once, in the order in which it lies, so that a thread reads 16 bytes at a time."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    BLOCK_P: tl.constexpr = BLOCK_D // 2
    if INTERLEAVED:
        channel = tl.arange(0, BLOCK_D)[None, :]
        both = load_known(ROWS + channel * stride_d, mask, channel < HEAD_DIM, HEAD_DIM == BLOCK_D)
        x, y = tl.split(tl.reshape(both, (both.shape[0], BLOCK_P, 2)))
    else:
        pair = tl.arange(0, BLOCK_P)[None, :]
        x = load_known(ROWS + pair * stride_d, mask, pair < PAIRS, HEAD_DIM == BLOCK_D)
        y = load_known(ROWS + (pair + PAIRS) * stride_d, mask, pair < PAIRS, HEAD_DIM == BLOCK_D)
    return x, y


@triton.jit
def store_members(ROWS, x, y, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of :func:`load_members`, for rows of adjacent channels."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    BLOCK_P: tl.constexpr = BLOCK_D // 2
    x, y = x.to(ROWS.dtype.element_ty), y.to(ROWS.dtype.element_ty)
    if INTERLEAVED:
        channel = tl.arange(0, BLOCK_D)[None, :]
        both = tl.reshape(tl.join(x, y), (x.shape[0], BLOCK_D))
        if HEAD_DIM == BLOCK_D:
            tl.store(ROWS + channel, both, mask=mask)
        else:
            tl.store(ROWS + channel, both, mask=mask & (channel < HEAD_DIM))
    else:
        pair = tl.arange(0, BLOCK_P)[None, :]
        known = mask
        if HEAD_DIM != BLOCK_D:
            known = mask & (pair < PAIRS)
        tl.store(ROWS + pair, x, mask=known)
        tl.store(ROWS + (pair + PAIRS), y, mask=known)


@triton.jit
def load_vector(V, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Members of one row of channels, two [1, BLOCK_D / 2] float32."""
    x, y = load_members(
        (V + tl.zeros([1], dtype=tl.int32))[:, None], tl.full([1, 1], 1, dtype=tl.int1), 1,
        HEAD_DIM, BLOCK_D, INTERLEAVED,
    )  # fmt: skip
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def load_turns(COS, SIN, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines and sines of the pairs of some rows, [rows, BLOCK_D / 2], of tables with HEAD_DIM / 2 a row. Offsets in a
    table are int32, which takes fewer registers."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    pair = tl.arange(0, BLOCK_D // 2)[None, :]
    at = rows[:, None] * PAIRS + pair
    all_known: tl.constexpr = HEAD_DIM == BLOCK_D
    return load_known(COS + at, None, pair < PAIRS, all_known), load_known(SIN + at, None, pair < PAIRS, all_known)


@triton.jit
def normalised(x, y, w_x, w_y, eps, HEAD_DIM: tl.constexpr):
    """RMS norm of members [rows, pairs] with weights [1 or rows, pairs], float32; eps is [rows]."""
    x, y = x.to(tl.float32), y.to(tl.float32)
    factor = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / HEAD_DIM + eps)[:, None]
    return x * (factor * w_x), y * (factor * w_y)


@triton.jit
def norm_weights(
    W, W2, rows, split, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """Weights of the RMS norms of two streams, members [rows, BLOCK_D / 2] float32."""
    x, y = load_vector(W, HEAD_DIM, BLOCK_D, INTERLEAVED)
    x2, y2 = load_vector(W2, HEAD_DIM, BLOCK_D, INTERLEAVED)
    first = (rows < split)[:, None]
    return tl.where(first, x, x2), tl.where(first, y, y2)


@triton.jit
def sincos_of_product(a, a_low, b, b_low):
    """Sine and cosine of ``(a + a_low) (b + b_low)`` quarter turns, float32, to about 1e-7 for products up to 1e5.

    Leading parts have 12 bits (the plan splits them), so ``a * b`` is exact and so is what is
    left of it when whole quarter turns are taken off; the sums that remain are small. The libdevice functions carry a
    path for huge arguments that spills.
    """
    product = a * b
    low = a * b_low + a_low * (b + b_low)
    shifted = (product + low) + ROUND
    return sincos_of_fraction(((product - (shifted - ROUND)) + low) * HALF_PI, shifted)


@triton.jit
def sincos(turns):
    """Sine and cosine of quarter turns, float32, to about 1e-7 plus what rounding has done to ``turns``."""
    shifted = turns + ROUND
    return sincos_of_fraction((turns - (shifted - ROUND)) * HALF_PI, shifted)


@triton.jit
def sincos_of_fraction(t, shifted):
    """Of ``t`` in [-pi/4, pi/4] past the whole quarter turns in the low bits of ``shifted``."""
    z = t * t
    sin = t + t * z * (-1.6666667e-1 + z * (8.3333333e-3 + z * (-1.984127e-4 + z * 2.7557319e-6)))
    cos = 1.0 + z * (-0.5 + z * (4.1666667e-2 + z * (-1.3888889e-3 + z * 2.4801587e-5)))
    quadrant = shifted.to(tl.int32, bitcast=True) & 3
    swap = (quadrant & 1) != 0
    sine = tl.where(swap, cos, sin)
    cosine = tl.where(swap, sin, cos)
    return tl.where(quadrant >= 2, -sine, sine), tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)


@triton.jit
def pair_of(channels, interleaved, PAIRS: tl.constexpr):
    """The RoPE pair a channel belongs to."""
    return tl.where(interleaved != 0, channels // 2, channels % PAIRS)


@triton.jit
def logit_map(row, rows, row_mask, BIAS, bias_rows, GROUPS, GAINS, LOGIT_BIASES, num_queries, scale):
    """The affine map a segment makes of its logits, in base 2: row factor ``scale delta g`` and row bias
    ``scale g (lambda - delta) <w q, mu> + b``, whose factors of q and mu the query kernel left in BIAS."""
    group = tl.load(row + GROUP)
    gain = tl.load(row + GAIN)
    logit_bias = tl.load(row + LOGIT_BIAS)
    delta = tl.load(GROUPS + group * GROUP_FIELDS + GROUP_DELTA, mask=group >= 0, other=1.0)
    bias = tl.load(BIAS + bias_rows, mask=when(group >= 0, row_mask), other=0.0)
    g = tl.load(GAINS + gain * num_queries + rows, mask=when(gain >= 0, row_mask), other=1.0)
    b = tl.load(
        LOGIT_BIASES + logit_bias * num_queries + rows, mask=when(logit_bias >= 0, row_mask), other=0.0
    )  # fmt: skip
    return scale * delta * g, scale * g * bias + b * LOG2E


@triton.jit
def load_key_bias(KEY_BIAS, keys, valid):
    """Biases of some keys in base 2; -inf of a masked key, and where ``valid`` is not."""
    return tl.load(KEY_BIAS + keys, mask=valid, other=-float("inf")) * LOG2E


@triton.jit
def softmax_step(qk, m_i, l_i):
    """Online softmax in base 2: weights of one tile, the factor that brings what was summed before to the new maximum,
    and the running state. m starts at LOWEST and not at -inf: a row that has met no key yet subtracts it from itself.
    """
    m_new = tl.maximum(m_i, tl.max(qk, 1))
    p = tl.exp2(qk - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def store_state(
    STATE, STATE_M, STATE_L, acc, m_i, l_i, state, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Running softmax of some sorted queries, for the fused loop to resume: unnormalised output, maximum and sum, in
    rows ``state`` (int64) of its tables."""
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(STATE_M + state, m_i, mask=mask)
    tl.store(STATE_L + state, l_i, mask=mask)
    rows = STATE + state[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(rows, acc, mask=mask[:, None] & (offs_d < HEAD_DIM)[None, :])
