"""A small language model learns one language after another, in Hugging Face's Trainer.

    torchrun --nproc-per-node 2 examples/train_transformers.py

Rehearsal makes this difference:
`diff examples/train_transformers.py examples/train_transformers_rehearsal.py`.
"""

from languages import LENGTH, language_tasks, print_accuracies
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


def main() -> None:
    """Trains on five made languages; rank 0 prints how well each is foreseen at the end."""
    set_seed(0)
    tasks = language_tasks()
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        "runs",  # the same folder on all ranks; nothing is saved here
        use_cpu=True,
        num_train_epochs=6,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    for train, _ in tasks:
        Trainer(model, arguments, train_dataset=train).train()
    if arguments.process_index == 0:
        print_accuracies(model, tasks)


if __name__ == "__main__":
    main()
