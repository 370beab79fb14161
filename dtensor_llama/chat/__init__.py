"""Everything that only fine-tuning needs: conversations, templates, masks, previews, LoRA, noise and sampled
answers.

README.md beside this file explains the formats. Import names from the modules, e.g.
dtensor_llama.chat.template.
"""
