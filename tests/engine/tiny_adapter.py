"""A LoRA adapter for the tiny model, made locally: two small matrices for one projection of each layer."""

import json
from pathlib import Path


def write_tiny_adapter(folder: Path, model: Path, *, seed: int = 0) -> Path:
    """Write the adapter into `folder` and return it. Needs torch."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    width, out = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, width, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 8, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder
