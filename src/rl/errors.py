"""Exceptions of training, named for outcomes; messages have four parts, as everywhere in flowgraph."""

from flowgraph import FlowgraphError, InvalidInputError


class ConfigError(InvalidInputError):
    """A setting breaks a stated rule, or two settings exclude each other."""


class TaskError(InvalidInputError):
    """A task is unknown, or its file or options cannot be read."""


class PolicyError(InvalidInputError):
    """This model or tokenizer cannot be trained as asked (LoRA targets, context length, padding)."""


class RewardError(FlowgraphError, ValueError):
    """A reward function raised, or returned something that is no finite number for every response."""


class CreditError(FlowgraphError, ValueError):
    """A credit rule is unknown, or returned something that is no score for every token."""


class CheckpointError(FlowgraphError, ValueError):
    """A checkpoint is missing, incomplete, foreign, or belongs to another configuration."""


class DivergedError(FlowgraphError, ArithmeticError):
    """A gradient or a loss is no finite number any more."""
