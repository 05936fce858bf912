"""The training steps of others, which ours is compared with: the official one, and Liger-Kernel's
chunked loss."""

from importlib.util import find_spec

import torch
from torch import nn
from torch.nn import functional as F

from extras import measure

# How Liger-Kernel's loss is run: as it comes (compiled, 1024 rows of logits at a time, all of them
# if there are fewer than twice as many), in chunks of our size on a CPU, and those not compiled
LIGER_OPTIONS = {
    "as it comes": {},
    "in chunks of 256": {"chunk_size": 256},
    "in chunks of 256, not compiled": {"chunk_size": 256, "compiled": False},
}


def official_loss(target_logits, reference_logits, draft_logits, labels, k):
    """The loss of CustomTrainer in the authors' utils.py (github.com/yuezhouhu/adaspec), restated:
    shifted copies, masked selects, three float32 softmaxes, KLDivLoss twice, quantile."""
    keep = (labels[:, 1:] != -100).flatten()[:, None]
    target_logits, reference_logits, draft_logits = (
        logits[:, :-1].flatten(0, 1).masked_select(keep).view(-1, logits.shape[-1]).float()
        for logits in (target_logits, reference_logits, draft_logits)
    )
    p = F.softmax(target_logits, dim=-1)
    divergence = nn.KLDivLoss(reduction="none")
    draft_kl = divergence(F.log_softmax(draft_logits, dim=-1), p).sum(-1)
    reference_kl = divergence(F.log_softmax(reference_logits, dim=-1), p).sum(-1)
    gap = draft_kl - reference_kl
    return draft_kl.masked_select(gap >= torch.quantile(gap, 1 - k)).mean()


def official_step(target, reference, draft, input_ids, labels, k: float, dtype) -> None:
    """The official step up to the gradients: three full forwards, logits at all positions, an
    attention mask.

    The forwards are given the labels, as there: each model so computes a cross-entropy in float32
    that nobody needs.
    """
    last = (labels != -100).cumsum(1).argmax(1)[:, None]
    mask = torch.arange(input_ids.shape[1], device=input_ids.device) <= last
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "use_cache": False}
    with measure.autocast(input_ids.device, dtype):
        output = draft(**inputs)
    with torch.no_grad():
        frozen = [model(**inputs).logits for model in (target, reference)]
    official_loss(*frozen, output.logits, labels, k).backward()


def liger_losses() -> dict[str, nn.Module]:
    """Liger-Kernel's JSD (beta 0.5) of chunked logits, as in LIGER_OPTIONS, without a cross-entropy
    to add: loss(student_states [N, d], student_weight, teacher_states, teacher_weight, labels [N])
    -> the mean over tokens. {} where it is not installed.

    Of the package only the part in plain PyTorch is imported, which needs no Triton.
    """
    if not find_spec("liger_kernel"):
        return {}
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return {
        name: LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **options)
        for name, options in LIGER_OPTIONS.items()
    }
