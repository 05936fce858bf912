"""What the tests of samplers share: small random models, slow re-statements, and statistics.

Statistical tests use fixed seeds, so they pass or fail for good; the false-alarm rate that each
states is the chance that an unlucky seed would have failed a correct sampler.
"""

import copy
import math

import torch
from transformers import (
    AutoModelForCausalLM,
    CodeGenConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
)

from speculative import Stats, speculative_generate

ARCHITECTURES = ["neox", "llama", "phi", "codegen"]
CONTEXT = 64
LOW_ALARM = 3.719  # the normal quantile of 1 - 1e-4


# Models


def build(architecture="llama", vocab=40, seed=0, hidden=32, context=CONTEXT, **extra):
    """A random model whose next-token distributions are far from uniform and differ from prefix
    to prefix."""
    common = {"vocab_size": vocab, "initializer_range": 0.4}
    common |= {"bos_token_id": None, "eos_token_id": None, **extra}
    sizes = {"hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 2 * hidden, "max_position_embeddings": context}
    gpt = {"n_embd": hidden, "n_layer": 2, "n_head": 4, "n_positions": context}
    config = {
        "neox": lambda: GPTNeoXConfig(**sizes, **common),
        "llama": lambda: LlamaConfig(**sizes, num_key_value_heads=2, **common),
        "phi": lambda: PhiConfig(**sizes, **common),
        "codegen": lambda: CodeGenConfig(**gpt, n_ctx=context, rotary_dim=4, **common),
        "gpt2": lambda: GPT2Config(**gpt, **common),
    }[architecture]()
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def noised(model, scale=0.15, seed=1):
    """A draft that agrees with the model now and then."""
    torch.manual_seed(seed)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.ndim > 1:
                parameter += scale * parameter.std() * torch.randn_like(parameter)
    return draft


def noisy(model, scale, seed=0):
    """A copy with noise of one size in all weights: some of its drafts are accepted, some not."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weights in model.parameters():
            weights += scale * torch.randn_like(weights)
    return model


def biased(model, bias):
    """A Phi model with the output bias given."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.as_tensor(bias, dtype=torch.float32))
    return model


def half_agreeing_pairs():
    """A target and a half-agreeing draft of every architecture."""
    targets = {name: build(name, seed=5) for name in ARCHITECTURES}
    return {name: (target, noised(target)) for name, target in targets.items()}


def five_token_models():
    """A target, a draft like it and one unlike it, over five tokens: all continuations can be
    enumerated."""
    small = {"vocab": 5, "hidden": 16, "initializer_range": 0.25}
    target = build("llama", **small)
    return target, noised(target, 0.6), build("llama", seed=9, **small)


# Counts


def same_counts(a, b, gamma):
    """Equal counts; lists of positions may differ by zeros at the end."""
    padding = Stats(per_position=([0] * gamma, [0] * gamma))
    return a + padding == b + padding


def slow_tree(target, draft, prompt, max_new_tokens, branching, ends=(), draft_logits=None):
    """Greedy tree drafting re-stated without trees, masks or caches: tokens and counts.

    Only the node on the target's path matters: there the draft's b likeliest tokens hold the
    target's choice or do not. `draft_logits(text, drafts)`: those of a draft that can only begin
    after a first, plain target call (an EAGLE head).
    """

    def logits(model, tokens):
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1]

    text, stats, depths = [], Stats(), len(branching)
    if draft_logits:
        text, stats.target_calls = [int(logits(target, prompt).argmax())], 1
    guesses = draft_logits or (lambda text, drafts: logits(draft, text + drafts))
    accepted_at, judged_at = [0] * depths, [0] * depths
    while len(text) < max_new_tokens and not (text and text[-1] in ends):
        usable = min(depths, max_new_tokens - len(text) - 1)
        start, accepted, ended = prompt + text, 0, False
        stats.target_calls += 1
        stats.rounds += usable > 0
        while True:
            own = int(logits(target, prompt + text).argmax())
            hit = False
            if accepted < usable:
                guess = guesses(start, text[len(start) - len(prompt) :])
                hit = own in guess.topk(branching[accepted]).indices
                judged_at[accepted] += 1
                accepted_at[accepted] += hit
            text.append(own)
            accepted += hit
            ended = hit and own in ends
            if not hit or ended:
                break
        stats.cut += ended
        stats.drafted += accepted if ended else usable
        stats.rejected += not ended and accepted < usable
        stats.never_judged += 0 if ended else max(0, usable - accepted - 1)
        stats.accepted += accepted
    stats.generated = len(text)
    return text, stats + Stats(per_position=(accepted_at, judged_at))


# Distributions


def reference_distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """One token's distribution in float64, written out with plain loops."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    if top_k:
        order = order[:top_k]
    total = sum(p[i] for i in order)
    nucleus, mass = [], 0.0
    for i in order:  # the shortest list of likeliest tokens that reaches top_p
        if nucleus and mass >= top_p:
            break
        nucleus.append(i)
        mass += float(p[i] / total)
    out = torch.zeros_like(p)
    out[nucleus] = p[nucleus]
    return out / out.sum()


def enumerate_texts(model, prompt, n, vocab, **sampling):
    """Exact probabilities [vocab ** n] of all continuations, in float64, on the CPU."""
    double, prompt = copy.deepcopy(model).double().cpu(), prompt.cpu()
    probabilities = torch.ones(1, dtype=torch.float64)
    texts = torch.empty(1, 0, dtype=torch.long)
    for _ in range(n):
        context = torch.cat([prompt.expand(len(texts), -1), texts], 1)
        with torch.no_grad():
            logits = double(context).logits[:, -1, :vocab]
        p = torch.stack([reference_distribution(row, **sampling) for row in logits])
        probabilities = (probabilities[:, None] * p).flatten()
        tokens = torch.arange(vocab).repeat(len(texts))[:, None]
        texts = torch.cat([texts.repeat_interleave(vocab, 0), tokens], 1)
    return probabilities


def chi_square(counts, expected):
    """(statistic, its 1 - 1e-4 quantile by Wilson and Hilferty); cells expected fewer than 8 times
    are pooled."""
    rare = expected < 8
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    used = expected > 0
    assert counts[~used].sum() == 0  # what cannot happen did not happen
    df = int(used.sum()) - 1
    critical = df * (1 - 2 / (9 * df) + LOW_ALARM * math.sqrt(2 / (9 * df))) ** 3
    return (((counts - expected) ** 2)[used] / expected[used]).sum().item(), critical


def sample_counts(target, draft, prompt, n, vocab, samples, *, seed=0, **settings):
    """How often each continuation came out of `samples` rows decoded together, and the counts."""
    ids = prompt.repeat(samples, 1)
    settings["generator"] = torch.Generator(ids.device).manual_seed(seed)
    out = speculative_generate(target, draft, ids, max_new_tokens=n, **settings)
    code = (out.sequences[:, prompt.shape[1] :].cpu() * vocab ** torch.arange(n - 1, -1, -1)).sum(1)
    return torch.bincount(code, minlength=vocab**n).double(), out.stats


def martingales(target, draft, texts, prompt_lengths, temperature):
    """Two sums over the tokens after the prompts that have mean 0 if every token has the target's
    distribution given those before it, in standard deviations:

    how often a token is one that the draft likes more than the target does (what too lenient or
    too strict a rule shifts most), and how likely tokens are to the target (what a cache that is
    not the text's shifts most). By the central limit theorem for martingales both are normal; texts
    are lists of tokens.
    """
    wide = [copy.deepcopy(model).double() for model in (target, draft)]
    sums, variances = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for text, start in zip(texts, prompt_lengths, strict=True):
        with torch.no_grad():
            logits = [model(torch.tensor([text])).logits[0, start - 1 : -1] for model in wide]
        p, q = ((each / temperature).softmax(-1) for each in logits)
        tokens = torch.tensor(text[start:])[:, None]
        for i, value in enumerate(((q > p).double(), p.log())):
            mean = (p * value).sum(-1)
            sums[i] += (value.gather(1, tokens)[:, 0] - mean).sum()
            variances[i] += ((p * value**2).sum(-1) - mean**2).sum()
    return (sums / variances.sqrt()).tolist()
