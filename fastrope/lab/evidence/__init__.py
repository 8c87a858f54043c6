"""What the methods do on the models of the lab: measured, stored, and told from what is stored.

Each method has a module of its own with ``measure``, ``text`` and ``draw``. ``measure`` runs pipelines through the
public interface and gives :class:`fastrope.lab.evidence.findings.Findings`, numbers per sample. The page and its
pictures are made of these and of nothing else, by :mod:`fastrope.lab.evidence.page`.
"""
