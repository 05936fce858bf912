"""Tree drafting: several drafts for every position, one target call for them all; lossless
(AdaSPEC's second open question).

A chain of drafts ends at its first miss. A tree puts more children under a node, so that a miss
needs all of them to fail: more tokens a target call, paid for with more positions in it. On a GPU
with idle arithmetic these are nearly free, on a CPU they are not: look at seconds per token, not at
tau alone.

    out = tree_generate(target, draft, input_ids, branching=(4, 2, 2, 1), max_new_tokens=128)
    out = tree_generate(target, draft, input_ids, branching=(3, 2), beam=True, max_new_tokens=128)

    python -m extras.tree --target DIR_OR_HUB_ID --draft DIR_OR_HUB_ID  # alone, chain and tree

The first tree has 4 children under the text, 2 under each of them and so on, 44 nodes in all. The
second has a level of 3 nodes and one of 2: with `beam` a level keeps the nodes that the draft finds
likeliest, whoever their parents are (EAGLE-2, arXiv 2406.16858, without its cut over all levels).

A node must see the text and its own ancestors only. The one way to say so that models share is a
4-D additive attention_mask with position_ids. GPT-NeoX, Llama, Phi (eager and sdpa) and CodeGen (it
has eager) take it; GPT-2, OPT, GPT-J, Falcon, Mistral, Qwen3, Phi-3, OLMo, Cohere and Granite did
when tried. Flash and flex attention do not, nor do models without position_ids (ALiBi: Bloom, MPT,
some Falcons): these are refused.
"""

import interrupt  # noqa: F401 -- first: it makes Ctrl-C during the other imports one line

# isort: split

import json
import math
import time
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
import transformers

import data
from cli import Parser, run_command, whole
from evaluate import bootstrap_interval
from models import end_tokens, load_pair
from own_rows import prompt_tokens
from speculative import (
    Lane,
    SpeculativeOutput,
    Stats,
    check_prompt,
    check_sampling,
    distribution,
    draw,
    end_token_list,
    grouped_attention,
    inference,
    likeliest,
    shared_vocabulary,
    speculative_generate,
    takes_positions,
    until_end,
)

# Models and their caches


class TreeLane(Lane):
    """A model and its cache of one row: slots hold a prefix of the text, then the round's nodes,
    level by level. Raises ValueError for a model that takes no tree mask."""

    def __init__(self, model, input_ids, vocab_size):
        super().__init__(model, input_ids, None, vocab_size)
        check_takes_masks(model, "a tree needs")

    def missing(self, text: list[int]) -> list[int]:
        """The tokens of the text that the cache lacks."""
        return text[self.cache.get_seq_length() :]

    def causal(self, length: int) -> torch.Tensor:
        """What the missing tokens of a text of this length may see, [missing, length] bool."""
        cached = self.cache.get_seq_length()
        shape = (length - cached, length)
        return torch.ones(shape, dtype=torch.bool, device=self.device).tril(cached)

    def forward(self, tokens, visible, keep):
        """Feed n tokens, of which each sees the slots `visible` [n, slots + n]; logits [keep, V] at
        the last ones."""
        mask = torch.zeros(visible.shape, dtype=self.model.dtype, device=self.device)
        mask.masked_fill_(~visible, -math.inf)
        position = visible.sum(-1) - 1  # a token that sees n others stands at position n
        tokens = torch.as_tensor(tokens, device=self.device)[None]
        inputs = {"attention_mask": mask[None, None], "position_ids": position[None]}
        return self.call(tokens, keep, **inputs)[0, -keep:, : self.vocab_size]

    def descend(self, parents: torch.Tensor) -> None:
        """Before a level is fed: which of the nodes fed last are its parents, [n]. For an EAGLE
        head (extras/eagle.py), whose nodes read what their parents wrote."""

    def rollback(self, length: int, path: list[int]) -> None:
        """Keep the first `length` slots and those of the path, as far as it was fed."""
        slots = self.cache.get_seq_length()
        path = [slot for slot in path if slot < slots]
        end = length + len(path)
        if path != list(range(length, end)):
            index = torch.tensor(path, device=self.device)
            for layer in self.cache.layers:  # the keys are rotated to the right positions already
                layer.keys[:, :, length:end] = layer.keys[:, :, index]
                layer.values[:, :, length:end] = layer.values[:, :, index]
        self.cache.crop(end - slots)


def check_takes_masks(model, user: str) -> None:
    """Raises ValueError, saying what the `user` needs, for a model that takes no attention mask
    [B, 1, n, slots] with position_ids."""
    name = type(model).__name__
    attention = model.config._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise ValueError(f"{user} attn_implementation eager or sdpa, {name} has {attention}")
    if not takes_positions(model):
        raise ValueError(f"{name}: {user} a model that takes position_ids")


def make_lanes(target, draft, *prompt) -> tuple[TreeLane, TreeLane]:
    if hasattr(draft, "tree_lanes"):
        return draft.tree_lanes(target, *prompt)
    return TreeLane(target, *prompt), TreeLane(draft, *prompt)


# A round


@dataclass
class Tree:
    """The drafts of a round. Node 0 is the last token of the text, the others follow by level."""

    tokens: list[int]  # of every node
    children: list[list[int]] = field(default_factory=lambda: [[]])  # of every node
    # of nodes above the last level, where children were drawn (T > 0, no beam)
    q: list[torch.Tensor] = field(default_factory=list)
    visible: list[torch.Tensor] = field(default_factory=list)  # a level [nodes, slots so far] each

    def add_level(self, first_parent: int, parents: list[int], tokens: list[int]) -> None:
        """Add nodes; parents count from the first node of the level above."""
        for parent, token in zip(parents, tokens, strict=True):
            self.children[first_parent + parent].append(len(self.tokens))
            self.tokens.append(token)
            self.children.append([])


def draw_children(q, b: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """b tokens for each row of q [n, V], drawn one after the other without replacement: the tokens
    [n, b], and whether they exist [n, b], since q may have fewer."""
    weights = q.clone()
    tokens, exist = [], []
    draws = torch.rand(b, len(q), 1, dtype=torch.float64, device=q.device, generator=generator)
    for uniform in draws:
        token = draw(weights, uniform).clamp_(max=q.shape[1] - 1)  # V once all weights are used up
        exist.append(weights.gather(1, token) > 0)
        tokens.append(token)
        weights.scatter_(1, token, 0)
    return torch.cat(tokens, 1), torch.cat(exist, 1)


def likeliest_children(
    logits, parents_log_q, count: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `count` likeliest children of n nodes, from their logits [n, V] and their own
    log-probabilities [n]: parents, tokens and log-probabilities, [<= count] each."""
    log_q = (logits.float() / (temperature or 1)).log_softmax(-1)
    children = (parents_log_q[:, None] + log_q).flatten()
    log_q, index = children.topk(min(count, len(children)))
    vocab_size = logits.shape[1]
    return index // vocab_size, index % vocab_size, log_q


def draft_tree(
    lane: TreeLane, text: list[int], branching, sampling, generator, beam: bool = False
) -> Tree:
    """Draft a tree under the text, one draft call a level. sampling: temperature, top_k, top_p."""
    tree = Tree(text[-1:])
    tree.visible.append(lane.causal(len(text)))
    level = lane.missing(text)
    first, n = 0, 1  # the nodes of the level above
    log_q = torch.zeros(1, device=lane.device)  # of these
    for b in branching:
        logits = lane.forward(level, tree.visible[-1], n)
        if beam:
            parents, level, log_q = likeliest_children(logits, log_q, b, sampling[0])
        elif sampling[0] > 0:
            q = distribution(logits, *sampling)
            tree.q.extend(q)
            tokens, exist = draw_children(q, b, generator)
            level = tokens[exist]
            parents = exist.nonzero()[:, 0]
        else:
            tokens = logits.topk(min(b, logits.shape[-1])).indices
            level = tokens.flatten()
            parents = torch.arange(n, device=level.device).repeat_interleave(tokens.shape[1])
        lane.descend(parents)
        itself = torch.eye(len(level), dtype=torch.bool, device=level.device)
        tree.visible.append(torch.cat([tree.visible[-1][-n:][parents], itself], 1))
        tree.add_level(first, parents.tolist(), level.tolist())
        first, n = first + n, len(level)
    return tree


def score_tree(lane: TreeLane, text: list[int], tree: Tree) -> torch.Tensor:
    """The target's logits at every node, [nodes, V], in one call."""
    width = len(text) + len(tree.tokens) - 1
    levels = [lane.causal(len(text)), *tree.visible[1:]]
    visible = torch.cat([F.pad(rows, (0, width - rows.shape[1])) for rows in levels])
    return lane.forward(lane.missing(text) + tree.tokens[1:], visible, len(tree.tokens))


def own_token(logits, sampling, generator) -> int:
    """A token of the target's own, from its logits [V]."""
    if sampling[0] == 0:
        return int(likeliest(logits))
    p = distribution(logits, *sampling)
    uniform = torch.rand(1, 1, dtype=torch.float64, device=p.device, generator=generator)
    return int(draw(p[None], uniform))


def judge(logits, q, drafts: list[int], sampling, generator) -> tuple[int | None, int]:
    """The rule at one node: (index of the accepted child, its token), or (None, the target's own).

    logits [V] of the target; drafts: the children's tokens in the order drawn from q [V]. Recursive
    rejection sampling: what p loses to a rejected child, max(p - q, 0), is what the next is judged
    by, against q without the tokens already drawn. q None (temperature 0, or a beam): the children
    were not drawn, and the one that is the target's own token is accepted.
    """
    if q is None:
        own = own_token(logits, sampling, generator)
        return (drafts.index(own) if own in drafts else None), own
    p = distribution(logits, *sampling)
    draws = len(drafts) + 1
    uniforms = torch.rand(draws, dtype=torch.float64, device=p.device, generator=generator)
    for i, token in enumerate(drafts):
        if uniforms[i] * q[token] < p[token]:  # u < p / q without a division
            return i, token
        residual = (p - q).clamp_(min=0)
        p = residual / residual.sum() if residual.sum() > 0 else p  # p == q to the last bit: none
        q = q.index_fill(0, torch.tensor(token, device=q.device), 0)
        q = q / q.sum()  # 0 / 0 after the last token of all, and then there is no next child
    return None, int(draw(p[None], uniforms[None, -1:]))


def accept_path(logits, tree: Tree, sampling, generator) -> tuple[list[int], list[int]]:
    """Judge from the root down: the accepted nodes, and all tokens that come out."""
    node, path, tokens = 0, [], []
    while True:
        children = tree.children[node]
        q = tree.q[node] if children and tree.q else None
        drafts = [tree.tokens[child] for child in children]
        index, token = judge(logits[node], q, drafts, sampling, generator)
        tokens.append(token)
        if index is None:
            return path, tokens
        node = children[index]
        path.append(node)


def tree_generate(
    target, draft, input_ids, *, branching=(4, 2, 2, 1), beam=False, max_new_tokens,
    temperature=0.0, top_k=0, top_p=1.0, eos_token_id=None, generator=None, vocab_size=None,
) -> SpeculativeOutput:  # fmt: skip
    """Decode one row as the target would, verifying a tree of drafts a target call (SpecInfer, Miao
    et al. 2023).

    Temperature 0: a node's children are the draft's likeliest tokens, and the path follows the
    target's argmax. Above 0: children are drawn without replacement and judged in turn, which
    leaves the target's distribution (Recursive Speculative Decoding, Jeon et al. 2024); with `beam`
    they are the likeliest ones here too, and the path follows the target's own draws. A round costs
    len(branching) draft calls and one target call of at most 1 + b0 + b0 b1 + ... positions (with
    `beam` 1 + b0 + b1 + ...), and waits for the device at every draft call and at every node or
    child that is judged.

    Stats count levels of the tree, not nodes, so that a branching of all ones counts as
    `speculative_generate` does: drafted = levels the row could use, accepted = tokens along the
    path, rejected = levels where every child failed (one a round at most), never_judged = levels
    below, per_position by depth. alpha is the chance that a level goes on.

    Args: as in `speculative_generate`, but for
        input_ids: [1, T]. branching: branching[d] children for every node at depth d (the root has
            depth 0), fewer where q has fewer tokens (top_k, top_p, a small vocabulary).
        beam: branching[d] counts the nodes at depth d + 1 over all parents instead, those that the
            draft finds likeliest after the text (at this temperature; top_k and top_p are then
            the target's alone).

    Raises:
        ValueError: as `speculative_generate`; more than one row; a branching < 1; a model that
            takes no tree mask.
    """
    check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    check_prompt((target, draft), input_ids, None, max_new_tokens)
    if len(input_ids) != 1:
        raise ValueError(f"a tree is drafted for one row at a time, got {len(input_ids)} rows")
    if not branching or min(branching) < 1:
        raise ValueError(f"branching must be one or more numbers of at least 1, got {branching}")
    vocab_size = shared_vocabulary((target, draft), vocab_size)
    ends = end_token_list(eos_token_id)
    sampling = (temperature, top_k, top_p)
    text = input_ids[0].tolist()
    limit = len(text) + max_new_tokens
    stats = Stats()
    target_lane, draft_lane = make_lanes(target, draft, input_ids, vocab_size)
    with inference(target, draft), grouped_attention(input_ids):
        while True:
            length = len(text)
            # A round's last token is the target's own, and no level is of use beyond it.
            depth = min(len(branching), limit - length - 1) if draft_lane.ready else 0
            tree = draft_tree(draft_lane, text, branching[:depth], sampling, generator, beam)
            logits = score_tree(target_lane, text, tree)
            path, tokens = accept_path(logits, tree, sampling, generator)
            new = until_end(tokens, ends)
            text += new
            stats.record(depth, len(path), new)
            if new[-1] in ends or len(text) == limit:
                break
            for lane in (target_lane, draft_lane):
                lane.rollback(length, [length - 1 + node for node in path])
    stats.check()
    return SpeculativeOutput(torch.tensor([text]).to(input_ids), stats, [stats])


# Comparison: the target alone, a chain and a tree


def tree_name(branching, beam: bool) -> str:
    """As in "tree 4,2,2,1" and "beam 3,2"."""
    return f"{'beam' if beam else 'tree'} {','.join(map(str, branching))}"


def compare(
    target, draft, prompts, *, branching, gamma, beam=False, seed=0, **sampling
) -> dict[str, dict]:
    """The target alone, a chain and a tree on the same prompts [1, T], in turn: counts, rates and
    seconds per token. tau is per target call, and so at equal target calls; positions = what a
    target call scores beside the prompt, at most."""
    if beam:
        nodes = sum(branching)
    else:
        nodes = sum(math.prod(branching[: depth + 1]) for depth in range(len(branching)))
    shape = {"branching": branching, "beam": beam}
    ways = {  # name: positions, the function, its models and its settings
        "target alone": (1, speculative_generate, (target, None), {}),
        f"chain {gamma}": (gamma + 1, speculative_generate, (target, draft), {"gamma": gamma}),
        tree_name(**shape): (nodes + 1, tree_generate, (target, draft), shape),
    }
    stats = {name: [] for name in ways}
    seconds = dict.fromkeys(ways, 0.0)
    for number, ids in enumerate([prompts[0], *prompts]):  # the first time to warm up
        for name, (_, generate, models, settings) in ways.items():
            generator = torch.Generator(ids.device).manual_seed(seed + number)
            start = time.perf_counter()
            output = generate(*models, ids, generator=generator, **settings, **sampling)
            if number:
                seconds[name] += time.perf_counter() - start
                stats[name].append(output.stats)
    result = {}
    for name, rows in stats.items():
        total = sum(rows, Stats())
        calls = [row.target_calls for row in rows]
        interval = bootstrap_interval([row.generated for row in rows], calls)
        rates = {"positions": ways[name][0], "tau": total.tau, "tau_interval": interval}
        speed = {"seconds_per_token": seconds[name] / total.generated}
        result[name] = {**rates, **asdict(total), **speed}
    return result


def node_counts(text: str) -> list[int]:
    """The type of --branching and --beam: numbers by depth, as in 4,2,2,1."""
    return [whole()(part) for part in text.split(",")]


def parse_arguments(argv: list[str] | None):
    parser = Parser(prog="extras.tree", description="Tokens per target call: chain against tree.")
    add = parser.add_argument
    add("--target", required=True, help="folder or Hub id of the target")
    add("--draft", required=True, help="folder or Hub id of the draft")
    add("--prompts", help='JSON lines with a "prompt" each; without it the offline test rows')
    add("--limit", type=whole(), default=20, help="the first so many prompts")
    add("--branching", type=node_counts, default="4,2,2,1", help="children of a node, by depth")
    add("--beam", type=node_counts, help="nodes of a level, by depth, in place of --branching")
    add("--gamma", type=whole(), help="drafts of the chain; without it as deep as the tree")
    add("--temperature", type=float, default=0.0, help="0 = greedy")
    add("--max-new-tokens", type=whole(), default=64, help="tokens written at most, a prompt")
    add("--seed", type=int, default=0, help="of the draws")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Compare from the command line. Raises ValueError or OSError for what a user can mend."""
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    branching = args.beam or args.branching
    gamma = args.gamma or len(branching)
    sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    check_sampling(seed=args.seed, **sampling)
    if args.prompts:
        texts = data.read_prompts(args.prompts)
    else:
        rows = data.load_rows("arithmetic", "test", limit=args.limit)
        texts = [data.TASKS["arithmetic"].prompt(row) for row in rows]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target, draft, tokenizer = load_pair(args.target, args.draft, torch.float32, device)
    is_chat = any(isinstance(text, list) for text in texts)
    ends = end_tokens(target, tokenizer, is_chat)
    sampling |= {"eos_token_id": ends, "vocab_size": len(tokenizer)}
    tokens = [prompt_tokens(text, tokenizer) for text in texts[: args.limit]]
    prompts = [torch.tensor([ids], dtype=torch.long, device=device) for ids in tokens]
    settings = {"branching": branching, "beam": bool(args.beam), "gamma": gamma, **sampling}
    settings["seed"] = args.seed
    result = compare(target, draft, prompts, **settings)
    if args.json:
        print(json.dumps({**vars(args), "device": str(device), "ways": result}))
        return
    limit = f"{args.max_new_tokens} new tokens at most"
    print(f"{len(prompts)} prompts, temperature {args.temperature}, {limit}, float32, {device}")
    for way, row in result.items():
        low, high = row["tau_interval"]
        line = f"{way:16} tau {row['tau']:.2f} ({low:.2f}-{high:.2f} over prompts)"
        line += f", {row['positions']:2} positions a target call"
        print(f"{line}, {1000 * row['seconds_per_token']:.2f} ms a token")


if __name__ == "__main__":
    run_command(main, "extras.tree")
