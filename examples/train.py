"""Train from Python, on rows that the program makes itself.

    python examples/train.py                 # a small model of the hub
    python examples/train.py path/to/model

One prompt has three responses here, and their scores say which of two is the better one.
"""

import random
import sys
from typing import Any

from fastdpo import TrainConfig, train

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def sums(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions for a sum, each with the right answer, a near one and one that is far off."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        responses = [str(a + b), str(a + b + 1), str(a + b + rng.randint(20, 90))]
        rows.append({"prompt": f"{a} + {b} = ", "responses": responses, "scores": [1.0, 0.5, 0.0]})
    return rows


def show(step: int, metrics: dict[str, float]) -> None:
    """One line a step."""
    accuracy, margin = (metrics[f"rewards/{name}"] for name in ("accuracies", "margins"))
    print(f"step {step}: reward accuracy {accuracy:.2f}, margin {margin:.3f}")


def main(model: str = MODEL, output_dir: str = "outputs/example-python", *, rows: int = 64) -> None:
    """Train `model` and say where it lies."""
    config = TrainConfig(
        model_name_or_path=model,
        output_dir=output_dir,
        overwrite_output_dir=True,
        learning_rate=1e-5,
        num_train_epochs=1,
        per_device_train_batch_size=12,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="no",
    )
    result = train(config, sums(rows), eval_rows=sums(16, seed=1), on_step=show)
    print(f"held-out reward accuracy {result.metrics['eval_rewards/accuracies']:.2f}")
    print(f"model, metrics and configuration: {result.output_dir}")


if __name__ == "__main__":
    main(*sys.argv[1:])
