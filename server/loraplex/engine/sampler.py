"""Sampler: logits of a whole batch to tokens and logprobs. Every row is worked on alone, whatever stands beside it."""

import torch
from torch import Tensor

from loraplex.engine.messages import TokenLogprobs
from loraplex.engine.sampling_params import SamplingParams
from loraplex.engine.sequence import Sequence
from loraplex.ops import Ops
from loraplex.ops.noise import row_key

_PREFIX = 256


class Sampler:
    def __init__(self, eos_token_ids: frozenset[int], ops: Ops):
        self._eos_token_ids = eos_token_ids
        self._ops = ops

    def sample(self, logits: Tensor, seqs: list[Sequence]) -> list[int]:
        """The next token of each sequence. `logits` float32 [len(seqs), V]; not changed."""
        if not seqs:
            return []
        work = logits
        if any(self._adjusts(seq) for seq in seqs):
            work = logits.clone()
            for row, seq in zip(work, seqs, strict=True):
                if self._adjusts(seq):
                    self._adjust(row, seq)
        tokens = _argmax(work)
        drawn = [i for i, seq in enumerate(seqs) if not seq.request.params.is_greedy]
        if drawn:
            index = torch.tensor(drawn, device=logits.device)
            tokens[index] = self._draw(work[index], [seqs[i] for i in drawn])
        return tokens.tolist()

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
            row.index_add_(0, torch.tensor(ids, device=row.device), torch.tensor(biases, device=row.device))
        forbidden = [token for token in self._forbidden(seq) if token < len(row)]  # others cannot come anyway
        if forbidden:
            row[torch.tensor(forbidden, device=row.device)] = -torch.inf
        if params.has_penalties:
            _penalise(row, seq, params)

    def logprobs(self, logits: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprobs]:
        """Of `tokens` under the raw `logits` [R, V], with the best `counts[i]` alternatives of each row."""
        if not tokens:
            return []
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
        most = max(counts)
        values, ids = logprobs.topk(most, dim=-1) if most else (logprobs[:, :0], logprobs[:, :0].long())
        result = []
        for token, logprob, count, row_ids, row_values in zip(
            tokens, chosen, counts, ids.tolist(), values.tolist(), strict=True
        ):
            top = tuple(zip(row_ids[:count], row_values[:count], strict=True))
            result.append(TokenLogprobs(token, logprob, top))
        return result


def _penalise(row: Tensor, seq: Sequence, params: SamplingParams) -> None:
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(seq.token_ids, device=row.device).unique()
        logits = row[seen]
        row[seen] = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    output = seq.token_ids[seq.num_prompt_tokens :]
    if output and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.tensor(output, device=row.device).unique(return_counts=True)
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
        index = torch.tensor(rows, device=logits.device)
        some = logits[index]
        floor = some.amax(-1, keepdim=True) + _column([params[i].min_p for i in rows], logits).log()
        logits[index] = some.masked_fill(some < floor, -torch.inf)


def _mask_top_k(logits: Tensor, params: list[SamplingParams]) -> None:
    """Drop tokens less likely than the k-th; equals of the k-th stay."""
    for i, p in enumerate(params):
        if 0 < p.top_k < logits.shape[1]:
            floor = logits[i].topk(p.top_k).values[-1]
            logits[i] = logits[i].masked_fill(logits[i] < floor, -torch.inf)


def _mask_top_p(logits: Tensor, params: list[SamplingParams]) -> None:
    """Keep the smallest set of most likely tokens whose probability reaches top_p (Holtzman et al. 2020); of equals
    the first. The set is mostly small: only where the best _PREFIX do not reach top_p the whole row is sorted."""
    rows = [i for i, p in enumerate(params) if p.top_p < 1.0]
    if not rows:
        return
    index = torch.tensor(rows, device=logits.device)
    some = logits[index]
    total = some.logsumexp(-1, keepdim=True)
    best = some.topk(min(_PREFIX, some.shape[1]), dim=-1).values
    reached = (best - total).exp().sum(-1).tolist()
    for row, i in enumerate(rows):
        top_p = params[i].top_p
        values = best[row] if reached[row] >= top_p else some[row].sort(descending=True).values
        probabilities = (values - total[row]).exp()
        count = max(1, int((probabilities.cumsum(-1) - probabilities < top_p).sum()))
        floor = values[count - 1]
        logits[i].masked_fill_(some[row] < floor, -torch.inf)
        equals = (some[row] == floor).nonzero().squeeze(1)
        logits[i, equals[count - int((values[:count] > floor).sum()) :]] = -torch.inf


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
