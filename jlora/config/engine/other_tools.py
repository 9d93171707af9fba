"""Settings of PEFT, transformers and TRL that have another name here, or are not supported.

Users copy whole sections from other tools. A key is ignored if its value asks for what jlora does
anyway, and is otherwise an error that names the equivalent setting.
"""

from __future__ import annotations

from typing import Any

from jlora import errors

OFF = (None, False)

NOT_YET = "jlora does not support this field of PEFT yet"

OTHER_TOOLS_KEYS: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "model": {
        "model_name_or_path": ((), "write model.name_or_path"),
        "pretrained_model_name_or_path": ((), "write model.name_or_path"),
        "torch_dtype": ((), "write model.dtype"),
        "attn_implementation": ((), "write model.attention"),
        "trust_remote_code": (OFF, "jlora never runs code from a model folder"),
        "use_cache": ((True, False, None), "generation always uses a KV cache"),
        "load_in_4bit": (OFF, "write quantization: {load_in_4bit: true}"),
        "load_in_8bit": (OFF, "write quantization: {load_in_8bit: true}"),
        "label2id": ((), "write model.id2label: a list of names in the order of their ids"),
        "problem_type": (
            (None, "single_label_classification"),
            "only single-label classification is supported",
        ),
        "device_map": ((None, "auto"), "set the mesh section"),
    },
    "quantization": {
        "quant_method": (("bitsandbytes",), "the quantized formats are those of bitsandbytes"),
        "llm_int8_threshold": (
            (6.0, None),
            "only weights are quantized, not activations",
        ),
        "llm_int8_enable_fp32_cpu_offload": (OFF, "offloading weights to the CPU is not supported"),
        "llm_int8_has_fp16_weight": (OFF, "frozen weights are stored in 8 bits only"),
        "bnb_4bit_quant_storage": ((None, "uint8"), "codes are always stored as uint8"),
        "bnb_4bit_blocksize": ((), "write quantization.block_size"),
        "blocksize": ((), "write quantization.block_size"),
    },
    "lora": {
        "peft_type": (("LORA", None), "only LORA is supported"),
        "peft_version": ((), "leave it out"),
        "inference_mode": ((True, False, None), "leave it out"),
        "auto_mapping": ((None,), NOT_YET),
        "alpha": ((), "write lora.lora_alpha"),
        "rank": ((), "write lora.r"),
        "dropout": ((), "write lora.lora_dropout"),
        "qalora_group_size": ((16, None), NOT_YET),
        "megatron_core": ((None, "megatron.core"), NOT_YET),
    }
    | {
        name: ((*OFF, {}, []), NOT_YET)
        for name in (
            "alora_invocation_tokens",
            "arrow_config",
            "corda_config",
            "ensure_weight_tying",
            "kasa_config",
            "layer_replication",
            "lora_ga_config",
            "megatron_config",
            "monteclora_config",
            "runtime_config",
            "use_bdlora",
            "use_qalora",
            "velora_config",
        )
    },
    "data": {
        "max_seq_length": ((), "write data.max_length"),
        "dataset_name": ((), "write data.train: [{path: …, format: …}]"),
        "dataset_text_field": ((), "write data.train: [{path: …, format: text}]"),
        "completion_only_loss": ((), "write data.assistant_only_loss"),
        "train_on_inputs": ((), "write data.assistant_only_loss: false"),
        "eval_dataset": ((), "write data.eval"),
        "validation": ((), "write data.eval"),
        "test": ((), "write data.eval"),
    },
    "train": {
        "evaluation_strategy": (
            ("steps",),
            "set train.eval_steps; null evaluates only at the end",
        ),
        "eval_strategy": (("steps",), "set train.eval_steps; null evaluates only at the end"),
        "save_strategy": (("steps",), "set train.save_steps; null saves only at the end"),
        "logging_strategy": (("steps",), "set train.logging_steps"),
        "lr": ((), "write train.learning_rate"),
        "epochs": ((), "write train.num_train_epochs"),
        "batch_size": ((), "write train.per_device_train_batch_size"),
        "micro_batch_size": ((), "write train.per_device_train_batch_size"),
        "per_gpu_train_batch_size": ((), "write train.per_device_train_batch_size"),
        "max_seq_length": ((), "write data.max_length"),
        "overwrite_output_dir": ((), "write train.resume: never"),
        "resume_from_checkpoint": (OFF, "write train.resume: auto, never or a checkpoint's folder"),
        "data_seed": ((None,), "train.seed determines the data order, too"),
        "report_to": (("none", None), "metrics.jsonl and report.html are always written"),
        "logging_dir": ((None,), "logs are written to train.output_dir"),
        "logging_first_step": (OFF, "set train.logging_steps to 1: it logs every step"),
        "run_name": ((None,), "set train.output_dir: its name is the run's"),
        "gradient_checkpointing_kwargs": (
            (None, {}, {"use_reentrant": False}),
            "write train.gradient_checkpointing",
        ),
        "group_by_length": (OFF, "write data.packing: true"),
        "dataloader_num_workers": ((0, None), "batches are prepared by a background thread"),
        "dataloader_drop_last": (OFF, "the last partial batch is always trained on"),
        "dataloader_pin_memory": ((True, False, None), "leave it out"),
        "remove_unused_columns": ((True, False, None), "leave it out"),
        "fsdp": (("", [], *OFF), "set mesh.fsdp"),
        "fsdp_config": ((None, {}), "set mesh.fsdp"),
        "deepspeed": ((None,), "set mesh.fsdp"),
        "ddp_find_unused_parameters": ((True, False, None), "leave it out"),
        "local_rank": ((-1, None), "leave it out"),
        "torch_compile": ((True, False, None), "every step is compiled by XLA"),
        "tf32": ((None,), "set train.bf16"),
        "no_cuda": (OFF, "set the environment variable JAX_PLATFORMS=cpu"),
        "use_cpu": (OFF, "set the environment variable JAX_PLATFORMS=cpu"),
        "loraplus_weight_decay": ((), "write train.weight_decay"),
        "optim_target_modules": ((None,), "GaLore and APOLLO are not supported"),
        "label_smoothing_factor": ((0, 0.0), "label smoothing is not supported"),
        "neftune_noise_alpha": ((None,), "NEFTune is not supported"),
        "load_best_model_at_end": (
            OFF,
            "set train.early_stopping_patience: the weights with the best eval_loss are saved",
        ),
        "push_to_hub": (OFF, "upload train.output_dir with huggingface-cli"),
        "auto_find_batch_size": (OFF, "set train.per_device_train_batch_size"),
        "do_train": ((True, None), "run python -m jlora.train"),
        "do_eval": ((True, False, None), "add data.eval"),
        "use_liger_kernel": (OFF, "leave it out"),
        "disable_tqdm": ((True, False, None), "leave it out"),
        "max_prompt_length": ((), "write data.max_length"),
    },
    "": {
        "peft": ((), "write the section lora"),
        "adapter": ((), "write the section lora"),
        "training": ((), "write the section train"),
        "trainer": ((), "write the section train"),
        "training_arguments": ((), "write the section train"),
        "dataset": ((), "write the section data"),
        "datasets": ((), "write the section data"),
        "quantization_config": ((), "write the section quantization"),
        "bnb_config": ((), "write the section quantization"),
        "base_model": ((), "write model: {name_or_path: …}"),
    },
}
"""Section → another tool's key → (values that ask for what jlora does anyway, the remedy for
every other value)."""


def has_no_effect(section: str, key: str, value: Any) -> bool:
    """Whether another tool's setting has a value that asks for what jlora does anyway."""
    values, _ = OTHER_TOOLS_KEYS.get(section, {}).get(key, ((), ""))
    # With types, since 0 == False and 1 == True in Python.
    return any(type(v) is type(value) and v == value for v in values)


def unknown_key_advice(
    section: str, key: str, keys_of: dict[str, list[str]]
) -> tuple[str, str | None]:
    """(cause, fix) for an unknown key; ``keys_of`` maps a section to its keys, "" to sections."""
    cause = "unknown key" if section else "unknown section"
    if key in OTHER_TOOLS_KEYS.get(section, {}):
        fix = OTHER_TOOLS_KEYS[section][key][1]
        return (fix, "remove the key") if fix == NOT_YET else (cause, fix)
    others = [s for s, keys in keys_of.items() if s and s != section and key in keys]
    if not others:
        others = [s for s, keys in OTHER_TOOLS_KEYS.items() if s and s != section and key in keys]
    if similar := errors.did_you_mean(key, keys_of[section]):
        return cause, similar
    if others and others[0] in keys_of:
        return cause, f"it belongs to the section {others[0]}"
    return cause, f"known keys: {', '.join(keys_of[section])}"
