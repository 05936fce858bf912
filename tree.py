"""Tree drafting: several drafts for every position, one target call for them all; lossless (AdaSPEC's second open question).

A chain of drafts ends at its first miss. A tree puts more children under a node, so that a miss needs all of them to fail:
more tokens a target call, paid for with more positions in it. On a GPU with idle arithmetic these are nearly free, on a CPU
they are not: look at seconds per token, not at tau alone.

    out = tree_generate(target, draft, input_ids, branching=(4, 2, 2, 1), max_new_tokens=128)

    python tree.py --target DIR_OR_HUB_ID --draft DIR_OR_HUB_ID  # target alone, chain and tree on the same prompts

Apart from speculative.py because of the mask: a node must see the text and its own ancestors only, and the one way to say so
that models share is a 4-D additive attention_mask with position_ids. GPT-NeoX, Llama, Phi (eager and sdpa) and CodeGen (it has
eager) take it; GPT-2, OPT, GPT-J, Falcon, Mistral, Qwen3, Phi-3, OLMo, Cohere and Granite did when tried. Flash and flex
attention do not, nor do models without position_ids (ALiBi: Bloom, MPT, some Falcons): these are refused.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict

import torch
import torch.nn.functional as F

import speculative
from speculative import (
    SpeculativeOutput,
    Stats,
    _check_arguments,
    _check_prompt,
    _distribution,
    _draw,
    _inference,
    _Lane,
    _takes_positions,
)


class _TreeLane(_Lane):
    """A model and its cache of one row: slots hold a prefix of the text, then the round's nodes, level by level."""

    def __init__(self, model, input_ids, vocab_size):
        super().__init__(model, input_ids, None, vocab_size, None)
        attention = model.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"a tree needs attn_implementation eager or sdpa, {type(model).__name__} has {attention}")
        if not _takes_positions(model):
            raise ValueError(f"{type(model).__name__}: a tree needs a model that takes position_ids")

    def causal(self, n: int) -> torch.Tensor:
        """What the tokens of a text of n that the cache lacks may see, [missing, n]."""
        have = self.cache.get_seq_length()
        return torch.ones(n - have, n, dtype=torch.bool, device=self.device).tril(have)

    def forward(self, tokens, seen, keep):
        """Feed tokens [n], of which each sees the slots `seen` [n, slots + n]; logits [keep, vocab_size] at the last ones."""
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device).masked_fill_(~seen, -math.inf)
        position = seen.sum(-1) - 1  # whoever sees n tokens and itself stands at position n
        tokens = torch.as_tensor(tokens, device=self.device)[None]
        logits = self.call(tokens, keep, attention_mask=mask[None, None], position_ids=position[None])
        return logits[0, -keep:, : self.vocab_size]

    def descend(self, parents: torch.Tensor) -> None:
        """Told before a level is fed which of the nodes fed last are its parents, [n]; only an EAGLE head asks (eagle.py)."""

    def rollback(self, n: int, path: list[int]) -> None:
        """Keep the first n slots and those of the path (slots it never had aside); drop the rest."""
        slots = self.cache.get_seq_length()
        path = [slot for slot in path if slot < slots]
        index = torch.tensor(path, dtype=torch.long, device=self.device)
        for layer in self.cache.layers:  # the keys are rotated to the right positions already
            layer.keys[:, :, n : n + len(path)] = layer.keys[:, :, index]
            layer.values[:, :, n : n + len(path)] = layer.values[:, :, index]
        self.cache.crop(n + len(path) - slots)


def _children(q, b, generator):
    """b tokens of each row of q [n, V], drawn one after the other without replacement: tokens and which exist, [n, b]."""
    weights, tokens, exist = q.clone(), [], []
    for uniform in torch.rand(b, len(q), 1, dtype=torch.float64, device=q.device, generator=generator):
        tokens.append(_draw(weights, uniform).clamp_(max=q.shape[1] - 1))  # V where all weights are used up
        exist.append(weights.gather(1, tokens[-1]) > 0)
        weights.scatter_(1, tokens[-1], 0)
    return torch.cat(tokens, 1), torch.cat(exist, 1)


def _judge(logits, q, drafts, sampling, generator):
    """The rule at one node: (index of the accepted child, its token), or (None, the target's own token).

    logits [V] of the target; drafts: the children's tokens in the order drawn from q [V]. Recursive rejection sampling: what
    p loses to a rejected child, max(p - q, 0), is what the next is judged by, against q without the tokens already drawn.
    """
    if sampling[0] == 0:
        own = int(logits.argmax())
        return drafts.index(own) if own in drafts else None, own
    p = _distribution(logits, *sampling)
    uniforms = torch.rand(len(drafts) + 1, dtype=torch.float64, device=p.device, generator=generator)
    for i, token in enumerate(drafts):
        if uniforms[i] * q[token] < p[token]:  # u < p / q without a division
            return i, token
        residual = (p - q).clamp_(min=0)
        p = residual / residual.sum() if residual.sum() > 0 else p  # p == q to the last bit leaves none
        q = q.index_fill(0, torch.tensor(token, device=q.device), 0)
        q = q / q.sum()  # 0 / 0 after the last token of all, and then there is no next child
    return None, int(_draw(p[None], uniforms[None, -1:]))


def tree_generate(
    target, draft, input_ids, *, branching=(4, 2, 2, 1), max_new_tokens, temperature=0.0, top_k=0, top_p=1.0,
    eos_token_id=None, generator=None, vocab_size=None,
) -> SpeculativeOutput:  # fmt: skip
    """Decode one row as the target would, verifying a tree of drafts a target call (SpecInfer, Miao et al. 2023).

    Temperature 0: a node's children are the draft's likeliest tokens, and the path follows the target's argmax. Above 0:
    children are drawn without replacement and judged in turn, which leaves the target's distribution (Recursive Speculative
    Decoding, Jeon et al. 2024). A round costs len(branching) draft calls and one target call of at most
    1 + b0 + b0 b1 + ... positions, and waits for the device at every draft call and at every node or child that is judged.

    Stats count levels of the tree, not nodes, so that a branching of all ones counts as `speculative_generate` does:
    drafted = levels the row could use, accepted = tokens along the path, rejected = levels where every child failed (one a
    round at most), never_judged = levels below, per_position by depth. alpha is the chance that a level goes on.

    Args: as in `speculative_generate`, but for
        input_ids: [1, T]. branching: branching[d] children for every node at depth d (the root has depth 0), fewer where q
            has fewer tokens (top_k, top_p, a small vocabulary).

    Raises:
        ValueError: as `speculative_generate`; more than one row; a branching < 1; a model that takes no tree mask.
    """
    _check_arguments(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    _check_prompt((target, draft), input_ids, None, max_new_tokens)
    if len(input_ids) != 1:
        raise ValueError(f"a tree is drafted for one row at a time, got {len(input_ids)} rows")
    if not branching or min(branching) < 1:
        raise ValueError(f"branching must be one or more numbers of at least 1, got {branching}")
    vocab_size = speculative._shared_vocabulary((target, draft), vocab_size)
    ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    sampling, text, stats = (temperature, top_k, top_p), input_ids[0].tolist(), Stats()
    limit = len(text) + max_new_tokens
    prompt = input_ids, vocab_size
    if hasattr(draft, "tree_lanes"):
        lanes = target_lane, draft_lane = draft.tree_lanes(target, *prompt)
    else:
        lanes = target_lane, draft_lane = [_TreeLane(model, *prompt) for model in (target, draft)]
    with _inference(target, draft):
        while True:
            n, depth = len(text), min(len(branching), limit - len(text) - 1)  # a round's last token is the target's own
            depth = depth if draft_lane.ready else 0
            tokens, kids, q = text[-1:], [[]], []  # by node, level by level; node 0 is the last token of the text
            parents, level, seen = [0], text[draft_lane.cache.get_seq_length() :], [draft_lane.causal(n)]
            for b in branching[:depth]:
                logits = draft_lane.forward(level, seen[-1], len(parents))
                if temperature > 0:
                    q.extend(_distribution(logits, *sampling))
                    drafts, exist = _children(torch.stack(q[-len(parents) :]), b, generator)
                else:
                    drafts = logits.topk(min(b, vocab_size)).indices
                    exist = torch.ones_like(drafts, dtype=torch.bool)
                level, parent = drafts[exist], exist.nonzero()[:, 0]
                draft_lane.descend(parent)
                itself = torch.eye(len(level), dtype=torch.bool, device=level.device)
                seen.append(torch.cat([seen[-1][-len(parents) :][parent], itself], 1))
                for i, token in zip(parent.tolist(), level.tolist(), strict=True):
                    kids[parents[i]].append(len(tokens))
                    tokens.append(token)
                    kids.append([])
                parents = range(len(tokens) - len(level), len(tokens))
            seen[0] = target_lane.causal(n)
            seen = torch.cat([F.pad(rows, (0, n + len(tokens) - 1 - rows.shape[1])) for rows in seen])
            logits = target_lane.forward(text[target_lane.cache.get_seq_length() :] + tokens[1:], seen, len(tokens))

            node, path, new = 0, [], []
            while node is not None:
                drafts = [tokens[kid] for kid in kids[node]]
                child, token = _judge(logits[node], q[node] if drafts and q else None, drafts, sampling, generator)
                new.append(token)
                node = None if child is None else kids[node][child]
                path += [] if node is None else [n - 1 + node]  # its slot
            end = next((i for i, token in enumerate(new) if token in ends), None)
            new = new if end is None else new[: end + 1]
            text += new
            stats._record(depth, len(path), new)
            if end is not None or len(text) == limit:
                break
            for lane in lanes:
                lane.rollback(n, path)
    stats.check()
    return SpeculativeOutput(torch.tensor([text]).to(input_ids), stats, [stats])


def compare(target, draft, prompts, *, branching, gamma, max_new_tokens, seed=0, **sampling) -> dict[str, dict]:
    """The target alone, a chain and a tree on the same prompts [1, T], in turn: counts, rates and seconds per token.

    tau is per target call, and so at equal target calls; positions = what a target call scores beside the prompt, at most.
    """
    common = {"max_new_tokens": max_new_tokens, **sampling}
    ways = {
        "target alone": (0, lambda ids, g: speculative.speculative_generate(target, None, ids, generator=g, **common)),
        f"chain {gamma}": (gamma, lambda ids, g: speculative.speculative_generate(
            target, draft, ids, gamma=gamma, generator=g, **common)),
        "tree " + ",".join(map(str, branching)): (
            sum(math.prod(branching[: d + 1]) for d in range(len(branching))),
            lambda ids, g: tree_generate(target, draft, ids, branching=branching, generator=g, **common)),
    }  # fmt: skip
    stats, seconds = {way: [] for way in ways}, dict.fromkeys(ways, 0.0)
    for number, ids in enumerate([prompts[0], *prompts]):  # the first time to warm up
        for way, (_, decode) in ways.items():
            start = time.perf_counter()
            out = decode(ids, torch.Generator(ids.device).manual_seed(seed + number))
            if number:
                seconds[way] += time.perf_counter() - start
                stats[way].append(out.stats)
    result = {}
    for way, (drafted, _) in ways.items():
        total = sum(stats[way], Stats())
        interval = speculative.bootstrap_interval([s.generated for s in stats[way]], [s.target_calls for s in stats[way]])
        result[way] = {"positions": drafted + 1, "tau": total.tau, "tau_interval": interval, **asdict(total)}
        result[way]["seconds_per_token"] = seconds[way] / total.generated
    return result


def main(argv: list[str] | None = None) -> int:
    """Compare from the command line; 0, or 2 after one line on stderr for what the user can mend."""
    import transformers

    parser = speculative.Parser(prog="tree.py", description="Tokens per target call: chain against tree.")
    parser.add_argument("--target", required=True, help="folder or Hub id of the target")
    parser.add_argument("--draft", required=True, help="folder or Hub id of the draft")
    parser.add_argument("--prompts", help='JSON lines with a "prompt" each (default: the offline arithmetic test rows)')
    parser.add_argument("--limit", type=int, default=20, help="the first so many prompts (default 20)")
    parser.add_argument("--branching", default="4,2,2,1", help="children of a node, by depth (default 4,2,2,1)")
    parser.add_argument("--gamma", type=int, help="drafts of the chain (default: as deep as the tree)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        branching = [int(b) if b.isdecimal() else 0 for b in args.branching.split(",")]
        gamma = len(branching) if args.gamma is None else args.gamma
        _check_arguments(gamma=gamma, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
        if min(branching) < 1:
            raise ValueError(f"branching must be numbers of at least 1 with commas between, got {args.branching!r}")
        if args.limit < 1:
            raise ValueError(f"limit must be at least 1, got {args.limit}")
        if args.prompts:
            texts = speculative._read_prompts(argparse.Namespace(prompt=None, prompts=args.prompts))
        else:
            import data

            texts = [data.TASKS["arithmetic"].prompt(row) for row in data.load_rows("arithmetic", "test")]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        target, draft, tokenizer = speculative.load_pair(args.target, args.draft, torch.float32, device)
        eos = target.generation_config.eos_token_id
        prompts = [torch.tensor([tokenizer(text).input_ids], dtype=torch.long, device=device) for text in texts[: args.limit]]
        found = compare(target, draft, prompts, branching=branching, gamma=gamma, seed=args.seed,
                        max_new_tokens=args.max_new_tokens, temperature=args.temperature, vocab_size=len(tokenizer),
                        eos_token_id=tokenizer.eos_token_id if eos is None else eos)  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"tree.py: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({**vars(args), "device": str(device), "ways": found}))
        return 0
    most = f"{args.max_new_tokens} new tokens at most"
    print(f"{len(prompts)} prompts, temperature {args.temperature}, {most}, float32, {device}")
    for way, row in found.items():
        line = f"{way:16} tau {row['tau']:.2f} ({row['tau_interval'][0]:.2f}-{row['tau_interval'][1]:.2f} over prompts)"
        print(f"{line}, {row['positions']:2} positions a target call, {1000 * row['seconds_per_token']:.2f} ms a token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
