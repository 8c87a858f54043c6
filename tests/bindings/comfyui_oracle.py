"""GRAG, LooseRoPE, Regions and NAG once more, in plain loops over dense logits, put into ComfyUI by hooks of its own.
Shares no code with the binding: tokens and positions are those that the host hands to its patches."""

from __future__ import annotations

import torch


def patched(model, rule):
    """A clone whose joint attention is ``rule(q, k, v, options, ids) -> out``, all ``(B, H, N, D)``, float64."""
    clone, seen = model.clone(), {}

    def post_input(arguments):
        seen["ids"] = torch.cat([arguments["txt_ids"], arguments["img_ids"]], dim=1)[0].double()
        return arguments

    def override(func, q, k, v, heads, *args, **kwargs):
        options = kwargs["transformer_options"]
        if options.get("block_index") is None:
            return func(q, k, v, heads, *args, **kwargs)
        out = rule(*(x.double() for x in (q, k, v)), options, seen.get("ids"))
        return out.transpose(1, 2).flatten(2).to(q.dtype)

    clone.set_model_post_input_patch(post_input)
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


def softmax(logits, v):
    return (logits * 1.0).softmax(dim=-1) @ v


def grag(bias, delta, text=None, text_dials=(1.0, 1.0)):
    """A group for each reference and, where ``text`` tells its length, one for the prompt."""

    def rule(q, k, v, options, ids):
        k, spans, end = k.clone(), [], k.shape[2]
        for count in reversed(options.get("reference_image_num_tokens", [])):
            spans.append((end - count, end, bias, delta))
            end -= count
        if text is not None:
            spans.append((0, text, *text_dials))
        for start, stop, b, d in spans:
            mean = k[:, :, start:stop].mean(dim=2, keepdim=True)
            k[:, :, start:stop] = b * mean + d * (k[:, :, start:stop] - mean)
        return softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, v)

    return rule


def angles(ids, axes_dim, theta):
    parts = []
    for axis, dim in enumerate(axes_dim):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        parts.append(ids[:, axis, None] * frequency)
    return torch.cat(parts, dim=1)


def turn(x, phi):
    """Interleaved pairs of ``x (..., D)`` turned by ``phi (..., D/2)``."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * phi.cos() - b * phi.sin(), a * phi.sin() + b * phi.cos()], dim=-1).flatten(-2)


def loose(scale, gain, crop, axes_dim, theta):
    """``scale`` and ``gain`` of the target's tokens, ``crop`` of the reference's, all flat."""

    def rule(q, k, v, options, ids):
        count, pairs = q.shape[2], sum(axes_dim) // 2
        references = sum(options["reference_image_num_tokens"])
        first, start = count - references - len(scale), count - references
        axis = torch.cat([torch.full((d // 2,), n) for n, d in enumerate(axes_dim)])
        phi = angles(ids, axes_dim, theta)
        logits = q @ k.transpose(-1, -2)
        q0, k0 = turn(q, -phi), turn(k, -phi)
        for i in range(len(scale)):
            factor = torch.where((axis == 1) | (axis == 2), scale[i], torch.ones(pairs, dtype=torch.float64))
            qi = turn(q0[:, :, first + i], factor * phi[first + i])
            ks = turn(k0[:, :, start:], factor * phi[start:])
            row = (ks @ qi[..., None])[..., 0]
            logits[:, :, first + i, start:] = torch.where(crop, gain[i] * row, row)
        return softmax(logits * q.shape[-1] ** -0.5, v)

    return rule


def dense(weight):
    """Attention with the logarithm of ``weight (N, N)``, of every query and key, added to its logits."""

    def rule(q, k, v, options, ids):
        return softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + weight.log(), v)

    return rule


def regions(owners, masks, target, local=False):
    """The weights ``(N, N)`` of regions, pair by pair.

    Args:
        owners: of every token, the set of its regions; empty for those that all see, and for the target.
        masks: of each region, ``(target tokens,)``.
        target: where the target's tokens begin.
    """
    count, size = len(owners), len(masks[0])
    drawn = range(target, target + size)
    weight = torch.ones(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            if owners[j] and i in drawn:
                weight[i, j] = max(float(masks[r][i - target]) for r in owners[j])
            elif owners[j] and owners[i]:
                weight[i, j] = bool(owners[i] & owners[j])
            elif local and i in drawn and j in drawn:
                mine, theirs = ({r for r, m in enumerate(masks) if m[n - target] > 0} for n in (i, j))
                weight[i, j] = not theirs or bool(mine & theirs)
    return weight


def nag(scale, tau, alpha, sizes):
    """A batch of two passes over one picture: rows with the prompt, then the same with the negative prompt. Texts of
    ``sizes`` tokens are padded behind to the longer one; the picture's attention is guided, the same in both."""
    longest = max(sizes)

    def rule(q, k, v, options, ids):
        logits, half, heads = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, len(q) // 2, q.shape[1]
        for rows, size in zip((slice(half), slice(half, None)), sizes, strict=True):
            logits[rows, :, :, size:longest] = -torch.inf
        out = softmax(logits, v)
        good, bad = (x[:, :, longest:].transpose(1, 2).flatten(2) for x in out.split(half))
        pushed = scale * good - (scale - 1) * bad
        growth = pushed.abs().sum(-1, keepdim=True) / good.abs().sum(-1, keepdim=True)
        picture = alpha * pushed * (tau / growth).clamp(max=1) + (1 - alpha) * good
        out[:, :, longest:] = picture.unflatten(2, (heads, -1)).transpose(1, 2).repeat(2, 1, 1, 1)
        return out

    return rule


def twice(texts):
    """A wrapper of the model's call that runs it with either of two texts in one batch, and keeps the first half."""
    longest = max(text.shape[1] for text in texts)
    texts = [torch.nn.functional.pad(text, (0, 0, 0, longest - text.shape[1])) for text in texts]

    def double(x, rows):
        if isinstance(x, list):
            return [double(each, rows) for each in x]
        batched = isinstance(x, torch.Tensor) and x.ndim > 0 and len(x) == rows
        return torch.cat([x, x]) if batched else x

    def wrapper(executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        rows, text = len(x), torch.cat([text.expand(len(x), -1, -1) for text in texts])
        given = {name: double(value, rows) for name, value in kwargs.items()}
        return executor(double(x, rows), double(t, rows), c_concat, text, control, options, **given)[:rows]

    return wrapper
