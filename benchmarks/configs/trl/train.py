"""Train by TRL's GRPO with token credit on the problems of a JSONL file; docs/train.md has the command lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig, ModelConfig, TrlParser, get_peft_config

from rl import CreditConfig, JsonlTask
from rl.integrations.trl import flow_grpo_trainer

RECOMMENDED = "recommended"


@dataclass
class RunArguments:
    """What this script reads beside the arguments of TRL."""

    problems: str = field(metadata={"help": "JSONL file of problems with the fields prompt and answer"})
    credit: str = field(default=RECOMMENDED, metadata={"help": "'recommended', or the name of a credit rule"})


def parsed(words: Sequence[str] | None = None) -> tuple[RunArguments, GRPOConfig, ModelConfig]:
    """Read the command line, and the file of ``--config``."""
    # TRL annotates its parser more narrowly than it works.
    kinds: Any = (RunArguments, GRPOConfig, ModelConfig)
    parsed_arguments: Any = TrlParser(kinds).parse_args_and_config(words)
    return parsed_arguments


def main() -> None:
    """Train, and go on from the newest checkpoint where ``--resume_from_checkpoint`` is given."""
    from datasets import Dataset

    run, args, model = parsed()
    task = JsonlTask(run.problems, shuffle=False)
    problems = [task.sample("train", number) for number in range(task.size)]

    def right(completions: list[Any], number: list[int], **columns: Any) -> list[float]:
        """Judge the text of each completion, which is a message where the prompt is a chat."""
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [task.reward(problems[index], text) for index, text in zip(number, texts, strict=True)]

    credit = CreditConfig.recommended() if run.credit == RECOMMENDED else CreditConfig(rule=run.credit)
    trainer = flow_grpo_trainer()(
        model.model_name_or_path,
        reward_funcs=right,
        args=args,
        train_dataset=Dataset.from_list(
            [{"prompt": problem.prompt, "number": number} for number, problem in enumerate(problems)]
        ),
        peft_config=get_peft_config(model),
        credit=credit,
        find_answer=task.find_answer,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
