"""Sampler: logits of a whole batch to tokens and logprobs. Every row is worked on alone, whatever stands beside it."""

import torch
from torch import Tensor

from loraplex.engine.messages import TokenLogprobs
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.sequence import Sequence
from loraplex.model.devices import fetch, send
from loraplex.ops import Ops
from loraplex.ops.noise import row_key

_PREFIX = 256


class Sampler:
    def __init__(self, eos_token_ids: frozenset[int], ops: Ops):
        self._eos_token_ids = eos_token_ids
        self._ops = ops

    def choose(self, logits: Tensor, seqs: list[Sequence]) -> Tensor:
        """The next token of each sequence, int64 [len(seqs)] on the logits' device: nothing here waits for one.
        `logits` float32 [len(seqs), V]; not changed."""
        if not seqs:
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        work = logits
        if any(self._adjusts(seq) for seq in seqs):
            work = logits.clone()
            for row, seq in zip(work, seqs, strict=True):
                if self._adjusts(seq):
                    self._adjust(row, seq)
        tokens = _argmax(work)
        drawn = [i for i, seq in enumerate(seqs) if not seq.request.params.is_greedy]
        if drawn:
            index = send(drawn, torch.int64, logits.device)
            tokens[index] = self._draw(work[index], [seqs[i] for i in drawn])
        return tokens

    def _draw(self, logits: Tensor, seqs: list[Sequence]) -> Tensor:
        """Gumbel-max over the truncated distribution. logits [R, V], a copy -> int64 [R]."""
        params = [seq.request.params for seq in seqs]
        logits /= _column([p.temperature for p in params], logits)
        _mask_min_p(logits, params)
        _mask_top_k(logits, params)
        _mask_top_p(logits, params)
        keys = [row_key(p.seed, seq.request.choice, seq.num_output_tokens) for p, seq in zip(params, seqs, strict=True)]
        return self._ops.draw(logits, keys)

    def _adjusts(self, seq: Sequence) -> bool:
        params = seq.request.params
        return bool(params.logit_bias or params.has_penalties or self._forbidden(seq))

    def _forbidden(self, seq: Sequence) -> frozenset[int]:
        """Tokens that may not come yet: the ends, while the output is shorter than min_tokens."""
        params = seq.request.params
        if seq.num_output_tokens >= params.min_tokens:
            return frozenset()
        return self._eos_token_ids | params.stop_token_ids

    def _adjust(self, row: Tensor, seq: Sequence) -> None:
        """logit_bias, min_tokens and the penalties, on one row [V] in place."""
        params = seq.request.params
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias, strict=True)
            row.index_add_(0, send(ids, torch.int64, row.device), send(biases, torch.float32, row.device))
        forbidden = [token for token in self._forbidden(seq) if token < len(row)]  # others cannot come anyway
        if forbidden:
            row.index_fill_(0, send(forbidden, torch.int64, row.device), -torch.inf)
        if params.has_penalties:
            _penalise(row, seq, params)

    def logprobs(self, logits: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
        """Of `tokens` under the raw `logits` [R, V], with the best `counts[i]` alternatives of each row."""
        if not tokens:
            return []
        found = rate(logits, send(tokens, torch.int64, logits.device), max(counts))
        return read_logprobs(tokens, counts, fetch(*found))


def rate(logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The logprobs float32 [R] of `tokens` int64 [R] under the raw `logits` [R, V], and of the best `most` of each row
    the logprobs float32 and the ids int64 [R, most], on the logits' device."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    values, ids = logprobs.topk(most, dim=-1) if most else (logprobs[:, :0], logprobs[:, :0].long())
    return chosen, values, ids


def read_logprobs(tokens: list[int], counts: list[int], rated: list[Tensor]) -> list[TokenLogprobs]:
    """What `rate` gave, on the host, with the best `counts[i]` of row i."""
    chosen, values, ids = (tensor.tolist() for tensor in rated)
    return [
        TokenLogprobs(token, logprob, tuple(zip(row_ids[:count], row_values[:count], strict=True)))
        for token, logprob, count, row_ids, row_values in zip(tokens, chosen, counts, ids, values, strict=True)
    ]


def _penalise(row: Tensor, seq: Sequence, params: SamplingParams) -> None:
    """Which tokens there are is found on the host: on a device the number of them would have to be waited for."""
    device = row.device
    if params.repetition_penalty != 1.0:
        seen = send(torch.tensor(seq.token_ids).unique(), torch.int64, device)
        logits = row[seen]
        row[seen] = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    output = seq.token_ids[seq.num_prompt_tokens :]
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = (send(part, torch.int64, device) for part in torch.tensor(output).unique(return_counts=True))
        row[ids] -= params.presence_penalty + params.frequency_penalty * counts


def _argmax(logits: Tensor) -> Tensor:
    """The first largest of each row [R, V] -> int64 [R]. numpy's is ten times as fast as torch's on a CPU."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _mask_min_p(logits: Tensor, params: list[SamplingParams]) -> None:
    """Drop tokens less likely than min_p times the most likely one."""
    rows = [i for i, p in enumerate(params) if p.min_p > 0]
    if rows:
        index = send(rows, torch.int64, logits.device)
        some = logits[index]
        floor = some.amax(-1, keepdim=True) + _column([params[i].min_p for i in rows], logits).log()
        logits[index] = some.masked_fill(some < floor, -torch.inf)


def _mask_top_k(logits: Tensor, params: list[SamplingParams]) -> None:
    """Drop tokens less likely than the k-th; equals of the k-th stay. Rows of the same k go together."""
    rows: dict[int, list[int]] = {}
    for i, p in enumerate(params):
        if 0 < p.top_k < logits.shape[1]:
            rows.setdefault(p.top_k, []).append(i)
    for k, own in rows.items():
        index = send(own, torch.int64, logits.device) if len(own) < len(logits) else None
        some = logits if index is None else logits[index]
        some.masked_fill_(some < some.topk(k, dim=-1).values[:, -1:], -torch.inf)
        if index is not None:
            logits[index] = some


def _mask_top_p(logits: Tensor, params: list[SamplingParams]) -> None:
    """Keep the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2020); of equals
    the first."""
    rows = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if rows:
        mask = mask_by_prefix if logits.device.type == "cpu" else mask_by_sorting
        mask(logits, rows, [params[i].top_p for i in rows])


def mask_by_prefix(logits: Tensor, rows: list[int], top_p: list[float]) -> None:
    """-inf past the nuclei of these rows of logits [R, V], in place. A nucleus is mostly small: only where the best
    _PREFIX do not reach top_p the whole row is sorted."""
    some = logits[send(rows, torch.int64, logits.device)]
    total = some.logsumexp(-1, keepdim=True)
    best = some.topk(min(_PREFIX, some.shape[1]), dim=-1).values
    reached = (best - total).exp().sum(-1).tolist()
    for row, i in enumerate(rows):
        values = best[row] if reached[row] >= top_p[row] else some[row].sort(descending=True).values
        probabilities = (values - total[row]).exp()
        count = max(1, int((probabilities.cumsum(-1) - probabilities < top_p[row]).sum()))
        floor = values[count - 1]
        logits[i].masked_fill_(some[row] < floor, -torch.inf)
        equals = (some[row] == floor).nonzero().squeeze(1)
        logits[i, equals[count - int((values[:count] > floor).sum()) :]] = -torch.inf


def mask_by_sorting(logits: Tensor, rows: list[int], top_p: list[float]) -> None:
    """The same for a device that is not to be waited for: every row is sorted whole."""
    index = send(rows, torch.int64, logits.device)
    some = logits[index]
    values, order = some.sort(dim=-1, descending=True, stable=True)
    probabilities = (values - some.logsumexp(-1, keepdim=True)).exp()
    count = (probabilities.cumsum(-1) - probabilities < _column(top_p, logits)).sum(-1, keepdim=True)
    is_past = torch.arange(some.shape[1], device=logits.device) >= count.clamp_min(1)
    logits[index] = some.scatter_(1, order, values.masked_fill(is_past, -torch.inf))


def _column(values: list[float], like: Tensor) -> Tensor:
    return send(values, like.dtype, like.device).unsqueeze(1)
