"""lm-eval's scoring of multiple choice with each question's context computed once instead of once a choice.

All endings of a context stand in one row, each blind to the others:

    tokens      context | ending 1 | ending 2 | ...
    positions   0 .. c-1 | c ..     | c ..     | ...
    sees        context | context, itself | context, itself | ...

The scores are the harness's own up to the rounding of floating-point sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = frozenset({"llama", "mistral", "opt", "qwen2"})
"""Model types known to take positions and an attention mask of any shape; others are scored the harness's way."""

Request = tuple[tuple[str, str], list[int], list[int]]


def harness_model(model: Any, tokenizer: Any, *, batch_size: int) -> Any:
    """lm-eval's model around a transformers model, sharing contexts where the architecture allows it."""
    from lm_eval.models.huggingface import HFLM

    kinds = (SharedContexts, HFLM) if model.config.model_type in ARCHITECTURES else (HFLM,)
    return type("HarnessModel", kinds, {})(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


class SharedContexts:
    """Stands before lm-eval's HFLM among a class's bases; only how log-likelihoods are computed differs."""

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Requests ((context, ending), context ids, ending ids) → (log-likelihood in nats, whether greedy) of each."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(index)
        shared, alone = [], []
        for context, members in groups.items():
            # The harness cuts what is too long from the left, by each ending's length: then nothing is shared.
            longest = len(context) + max(len(requests[index][2]) for index in members)
            if longest <= self.max_length + 1:
                shared.append(members)
            else:
                alone.extend(members)
        shared.sort(key=lambda members: len(requests[members[0]][1]))
        found = super()._loglikelihood_tokens([requests[index] for index in alone], disable_tqdm, override_bs)
        scores = dict(zip(alone, found, strict=True))
        for start in range(0, len(shared), self.batch_size):
            rows = shared[start : start + self.batch_size]
            found = self._score([(requests[row[0]][1], [requests[index][2] for index in row]) for row in rows])
            for members, of_row in zip(rows, found, strict=True):
                scores.update(zip(members, of_row, strict=True))
        return [scores[index] for index in range(len(requests))]

    @torch.no_grad()
    def _score(self, rows: list[tuple[list[int], list[list[int]]]]) -> list[list[tuple[float, bool]]]:
        """Rows of (context ids, its endings' ids), in one forward pass → the scores of each row's endings."""
        # An ending's last token is read by none.
        tokens = [context + [token for ending in endings for token in ending[:-1]] for context, endings in rows]
        length, shortest = max(map(len, tokens)), min(len(context) for context, _ in rows)
        ids, positions, owner = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
        owner -= 1  # of padding, which sees the context and itself: a row of a mask that allows nothing gives NaN
        for row, (context, endings) in enumerate(rows):
            ids[row, : len(tokens[row])] = torch.tensor(tokens[row])
            lengths = [len(context), *(len(ending) - 1 for ending in endings)]
            owner[row, : sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            inside = [torch.arange(len(context)), *(len(context) + torch.arange(n) for n in lengths[1:])]
            positions[row, : sum(lengths)] = torch.cat(inside)
        logits = self.model(
            input_ids=ids.to(self.device),
            position_ids=positions.to(self.device),
            attention_mask=_mask(owner, self.model.dtype).to(self.device),
            use_cache=False,
            logits_to_keep=length - shortest + 1,
        ).logits
        return [
            self._row_scores(of_row[len(context) - shortest :], endings)
            for of_row, (context, endings) in zip(logits, rows, strict=True)
        ]

    def _row_scores(self, logits: Tensor, endings: list[list[int]]) -> list[tuple[float, bool]]:
        """logits: [T, V] from the context's last token on, which predicts the first token of every ending."""
        scores, used = [], 1
        for ending in endings:
            places = [0, *range(used, used + len(ending) - 1)]
            used += len(ending) - 1
            likely = logits[places].log_softmax(-1, dtype=self.softmax_dtype)
            wanted = torch.tensor(ending, device=logits.device)
            score = likely.gather(1, wanted[:, None]).sum()
            scores.append((score.item(), bool((likely.argmax(-1) == wanted).all())))
        return scores


def _mask(owner: Tensor, dtype: torch.dtype) -> Tensor:
    """owner: [B, T], 0 for the context, else whose ending.  Returns what is added to attention scores, [B, 1, T, T]."""
    same = owner[:, :, None] == owner[:, None, :]
    seen = (same | (owner == 0)[:, None, :]).tril()
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
