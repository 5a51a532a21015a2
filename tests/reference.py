"""Slow, obvious reference of the method: loops over sequences and tokens, written from the paper's equations."""

import math

import torch


def log_ratio(p, q, mask, level, turn_ids=None):
    """Log importance ratio of every token, as a list of lists of scalars with gradient; masked tokens are None."""
    rows = []
    for b in range(p.shape[0]):
        tokens = [t for t in range(p.shape[1]) if mask[b, t]]
        gap = {t: p[b, t] - q[b, t] if math.isfinite(q[b, t]) else p[b, t] - p[b, t].detach() for t in tokens}
        turn, turns = -1, {}
        for t in range(p.shape[1]):
            if mask[b, t] and (t == 0 or not mask[b, t - 1]):
                turn += 1
            turns[t] = turn if turn_ids is None else int(turn_ids[b, t])
        row = [None] * p.shape[1]
        for t in tokens:
            if level == "token":
                row[t] = gap[t]
                continue
            if level.startswith("sequence"):
                seen = tokens
            elif level.startswith("cumulative_token"):
                seen = [s for s in tokens if s <= t]
            elif level == "cumulative_turn":
                seen = [s for s in tokens if turns[s] <= turns[t]]
            total = sum(float(gap[s].detach()) for s in seen)
            if level.endswith("geometric"):
                total /= len(seen)
            row[t] = total + p[b, t] - p[b, t].detach()
        rows.append(row)
    return rows


def token_losses(p, q, mask, advantages, level, low, high, dual_clip):
    """Clipped surrogate of every token (METHOD, section 3); masked tokens are None."""
    losses = []
    for b, row in enumerate(log_ratio(p, q, mask, level)):
        advantage = float(advantages[b])
        losses.append([None] * len(row))
        for t, u in enumerate(row):
            if u is None:
                continue
            # Clamped logarithm: outside, a constant without gradient.
            u = (
                u
                if abs(float(u.detach())) <= 20
                else torch.tensor(math.copysign(20.0, float(u.detach())), dtype=p.dtype)
            )
            ratio = torch.exp(u)
            clipped = torch.clamp(ratio, 1 - low, 1 + high)
            loss = torch.max(-advantage * ratio, -advantage * clipped)
            if advantage < 0 and dual_clip is not None:
                loss = torch.min(loss, torch.tensor(-advantage * dual_clip, dtype=p.dtype))
            losses[b][t] = loss
    return losses


def token_mean(losses):
    flat = [loss for row in losses for loss in row if loss is not None]
    return sum(flat) / len(flat)
