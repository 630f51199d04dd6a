"""Architecture, as a model's config.json names it -> its class. Adding one is a module and a row here.

Apart from registry.py so that a configuration can be checked without loading torch.
"""

MODELS: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("worker.models.llama", "LlamaForCausalLM"),
    "Qwen2ForCausalLM": ("worker.models.qwen2", "Qwen2ForCausalLM"),
}
