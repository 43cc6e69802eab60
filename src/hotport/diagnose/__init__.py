"""Explain ports and machines: the facts, the rules that apply, the risks, and what to do.

The rule itself is in `hotport.model.bind`, below `kernel`, because an error of a bind carries its sentence.
"""
