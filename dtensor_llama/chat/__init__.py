"""Contains everything that only fine-tuning needs: conversations, templates, masks, LoRA, noise and answers.

README.md beside this file explains the formats. Import names from the modules, for example from
dtensor_llama.chat.template.
"""
