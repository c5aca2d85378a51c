"""Additions to mmpretrain's classifiers for pre-training.

This needs mmpretrain, so ``import mmvssm`` does not import it; configs name both:
``custom_imports = dict(imports=['mmvssm', 'mmvssm.pretraining'])``.
"""

from .distillation import DistillationHead, DistilledClassifier

__all__ = ["DistillationHead", "DistilledClassifier"]
