"""fastdpo: Direct Preference Optimization without padding, repeated prompts or full logits."""

__version__ = "0.1.0"
