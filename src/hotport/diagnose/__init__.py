"""Explains a port, and a machine: what was read, by which rule it is judged, what could go wrong, what to do.

The rule itself is in `hotport.model.bind`, below `kernel`, because an error of a bind carries its sentence.
"""
