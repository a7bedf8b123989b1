"""Exceptions of training, named for outcomes. Every message states the argument, the rule, the value and a remedy."""

from flowgraph import FlowgraphError, InvalidInputError


class ConfigError(InvalidInputError):
    """A setting breaks a stated rule, or two settings exclude each other."""


class TaskError(InvalidInputError):
    """A task is unknown, or its file or options are invalid."""


class PolicyError(InvalidInputError):
    """A model or tokenizer cannot be trained with these settings (LoRA targets, context length, padding)."""


class RewardError(FlowgraphError, ValueError):
    """A reward function raised, or did not return a finite number for every response."""


class CreditError(FlowgraphError, ValueError):
    """A credit rule is unknown, or did not return a score for every token."""


class CheckpointError(FlowgraphError, ValueError):
    """A checkpoint is missing, incomplete, foreign, or belongs to another configuration."""


class DivergedError(FlowgraphError, ArithmeticError):
    """A gradient or a loss is no longer finite."""
