"""The optimizer's step in Triton: draws and updates of many tensors, in one launch and one pass over memory each.

The numbers of a launch come as one table of integers in the memory of the GPU, row by row: the settings (the bits of
float64), the sizes of the tensors, and the addresses of each operand's tensors. The programs with one `program_id(1)`
share a tensor. Rounded as `csrc/step.cpp` does.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tensors"])
def draw(table, tensors, dtype: tl.constexpr, block: tl.constexpr):
    """Write w = μ + ε / sqrt(precision)."""
    row = table + tl.program_id(1)  # sizes, then addresses
    size = tl.load(row)
    weights = tl.load(row + tensors).to(tl.pointer_type(dtype))
    mean = tl.load(row + 2 * tensors).to(tl.pointer_type(dtype))
    precision = tl.load(row + 3 * tensors).to(tl.pointer_type(dtype))
    noise = tl.load(row + 4 * tensors).to(tl.pointer_type(dtype))
    step = tl.num_programs(0).to(tl.int64) * block
    for first in range(tl.program_id(0).to(tl.int64) * block, size, step):
        i = first + tl.arange(0, block)
        inside = i < size
        p = tl.load(precision + i, mask=inside, other=1.0)
        m = tl.load(mean + i, mask=inside, other=0.0)
        e = tl.load(noise + i, mask=inside, other=0.0)
        scale = _over(tl.full((block,), 1, dtype), _root(p, dtype), dtype)
        tl.store(weights + i, tl.fma(scale, e, m), mask=inside)


@triton.jit(do_not_specialize=["tensors"])
def update(
    table,
    tensors,
    has_momentum: tl.constexpr,
    clips: tl.constexpr,
    order_updated: tl.constexpr,
    dtype: tl.constexpr,
    block: tl.constexpr,
):
    """Write μ_{t+1}, s_{t+1} and m_{t+1}: lines 6 and 7, see `VOGN`."""
    new_curvature_weight = _setting(table, dtype)
    new_gradient_weight = _setting(table + 1, dtype)
    mass = _setting(table + 2, dtype)
    averaged_prior = _setting(table + 3, dtype)
    prior = _setting(table + 4, dtype)
    prior_mean = _setting(table + 5, dtype)
    shift = _setting(table + 6, dtype)
    lr = _setting(table + 7, dtype)
    most = _setting(table + 8, dtype)
    row = table + 9 + tl.program_id(1)  # sizes, then addresses
    size = tl.load(row)
    mean = tl.load(row + tensors).to(tl.pointer_type(dtype))
    curvature = tl.load(row + 2 * tensors).to(tl.pointer_type(dtype))
    gradient = tl.load(row + 3 * tensors).to(tl.pointer_type(dtype))
    second_moment = tl.load(row + 4 * tensors).to(tl.pointer_type(dtype))
    new_mean = tl.load(row + 5 * tensors).to(tl.pointer_type(dtype))
    new_curvature = tl.load(row + 6 * tensors).to(tl.pointer_type(dtype))
    if has_momentum:
        momentum = tl.load(row + 7 * tensors).to(tl.pointer_type(dtype))
        new_momentum = tl.load(row + 8 * tensors).to(tl.pointer_type(dtype))
    step = tl.num_programs(0).to(tl.int64) * block
    for first in range(tl.program_id(0).to(tl.int64) * block, size, step):
        i = first + tl.arange(0, block)
        inside = i < size
        m = tl.load(mean + i, mask=inside, other=0.0)
        s = tl.load(curvature + i, mask=inside, other=1.0)
        numerator = tl.load(gradient + i, mask=inside, other=0.0)
        h = tl.load(second_moment + i, mask=inside, other=0.0)
        updated = _lerp(s, h, new_curvature_weight)
        tl.store(new_curvature + i, updated, mask=inside)
        from_prior = m - prior_mean
        numerator = tl.fma(from_prior, averaged_prior, numerator)
        if has_momentum:
            average = _lerp(tl.load(momentum + i, mask=inside, other=0.0), numerator, new_gradient_weight)
            tl.store(new_momentum + i, average, mask=inside)
            numerator = _over(average, mass, dtype)
        numerator = tl.fma(from_prior, prior, numerator)
        if order_updated:
            divisor = updated + shift
        else:
            divisor = s + shift
        if clips:  # comparisons are such that a NaN stays one
            change = _over(numerator, divisor, dtype)
            change = tl.where(change > most, most, change)
            change = tl.where(change < -most, -most, change)
            tl.store(new_mean + i, tl.fma(change, -lr, m), mask=inside)
        else:
            tl.store(new_mean + i, m + _over(-lr * numerator, divisor, dtype), mask=inside)


@triton.jit
def _setting(place, dtype: tl.constexpr):
    return tl.load(place).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def _lerp(a, b, weight):
    """`a` moved towards `b` by the share `weight`, rounded as by `torch.lerp`."""
    return tl.where(weight < 0.5, tl.fma(b - a, weight, a), tl.fma(b - a, weight - 1, b))


# Triton's `/` and `sqrt` of float32 are fast, not exact.


@triton.jit
def _over(a, b, dtype: tl.constexpr):
    if dtype == tl.float32:
        result = tl.div_rn(a, b)
    else:
        result = a / b
    return result


@triton.jit
def _root(x, dtype: tl.constexpr):
    if dtype == tl.float32:
        result = tl.sqrt_rn(x)
    else:
        result = tl.sqrt(x)
    return result
