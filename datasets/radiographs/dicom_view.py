"""Body part and view of a DICOM radiograph by its header: a chest, frontal or lateral, or a reason why it is not.

ViewPosition and ViewCodeSequence count first. Files without them are known by SeriesDescription and the like, or by
the plane of PatientOrientation.
"""

from __future__ import annotations

import re

import pydicom
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from raylift.datasets.radiographs.pairing import ViewName

MODALITIES = ("DX", "CR", "DR", "RG", "RF", "XA", "OT", "SC")
"""Modalities of radiographs, digitized and secondary captures among them."""
OTHER_BODY_PARTS = (
    "ABDOMEN", "ANKLE", "ARM", "BREAST", "CALCANEUS", "COCCYX", "CSPINE", "ELBOW", "EXTREMITY", "FEMUR", "FINGER",
    "FOOT", "FOREARM", "HAND", "HEAD", "HIP", "HUMERUS", "JAW", "KNEE", "LEG", "LSPINE", "MANDIBLE", "MAXILLA",
    "LUMBAR", "NECK", "ORBIT", "PELVIS", "SACRUM", "SHOULDER", "SINUS", "SKULL", "TEETH", "THUMB", "TIBIA", "TOE",
    "WRIST", "ZYGOMA",
)  # fmt: skip
"""Words of BodyPartExamined and AnatomicRegionSequence, or else of a description, that exclude a chest, in the plural
too; these are often free text, so all others are accepted."""
OTHER_STEMS = {part.removesuffix("S") for part in OTHER_BODY_PARTS}
CHEST_WORDS = ("CHEST", "THORAX", "TORAX", "LUNG", "LUNGS")
"""Words that make others exclude nothing, as in CHEST ABDOMEN."""
DESCRIPTIONS = ("SeriesDescription", "AcquisitionDeviceProcessingDescription", "ProtocolName", "StudyDescription")
"""Free texts that may name the body part and the view, by precedence."""
WORDS: dict[str, ViewName] = {
    **dict.fromkeys(("frontal", "pa", "ap", "posteroanterior", "anteroposterior"), "frontal"),
    **dict.fromkeys(("lateral", "lat", "ll", "rl", "llat", "rlat", "xtable", "seitlich", "profil"), "lateral"),
}  # fmt: skip
"""Words of a view in DICOM headers. XTABLE is a lateral with a horizontal beam."""
OTHER_VIEWS = re.compile(r"(?:lld|rld|llo|rlo|lao|rao|lpo|rpo|axial|apical|swimmers)|obl.*|.*(?:decub|lordo).*")
"""Words of views that are neither frontal nor lateral, also cut short as OBL, DECUB and LORDO: a left lateral decubitus
(LLD) is taken from the front."""
NEGATED = re.compile(r"(?:^|[^a-z])(?:non|not|no)[^a-z]*(?:frontal|lateral)", re.IGNORECASE)
"""Words by which a text excludes a view."""
COMPANION = re.compile(r"bone|tissue|.*suppress.*|.*subtract.*|tubes?|lines?|catheters?|cad")
"""Words of images computed from a radiograph: of bone or soft tissue alone, with lines enhanced, with marks of CAD."""
CODES: dict[ViewName, tuple[Code, ...]] = {
    "frontal": (codes.cid4010.AnteroPosterior, codes.cid4010.PosteroAnterior, codes.cid4010.Frontal),
    "lateral": (codes.cid4010.LateralProjection, codes.cid4010.LeftLateral, codes.cid4010.RightLateral),
}
"""DICOM's context group 4010, DX views, in SNOMED CT and its earlier codes."""


def why_no_radiograph(header: pydicom.Dataset) -> str:
    """The reason why a DICOM object is no radiograph of a chest by its header, with the remedy, or nothing."""
    remedy = "give a radiograph of the chest, or correct the tag"
    modality = str(header.get("Modality") or "").strip().upper()
    if modality and modality not in MODALITIES:
        return f"modality {modality} is not that of a radiograph: {remedy}"
    parts = [("BodyPartExamined", str(header.get("BodyPartExamined") or ""))]
    regions = header.get("AnatomicRegionSequence") or ()
    parts += [("AnatomicRegionSequence", str(item.get("CodeMeaning") or "")) for item in regions]
    if not any(text for _, text in parts):
        parts = [(tag, str(header.get(tag) or "")) for tag in DESCRIPTIONS]
    for tag, text in parts:
        words = re.split(r"[^A-Z]+", text.upper())
        if set(words) & set(CHEST_WORDS):
            return ""
        if {word.removesuffix("S") for word in words} & OTHER_STEMS:
            return f"{tag} {text.strip().upper()} is not a chest: {remedy}"
    return ""


def view_of(header: pydicom.Dataset) -> tuple[ViewName | None, str]:
    """The view by ViewPosition and ViewCodeSequence, or None and the reason; no reason where neither is set."""
    position = str(header.get("ViewPosition") or "")
    view = view_in_words(position)
    if _names_other_view(position):
        return None, f"ViewPosition {position} is neither frontal nor lateral"
    items = list(header.get("ViewCodeSequence") or ())
    # A modifier is part of the item of its view; some devices write it next to the sequence.
    for part in (header, *items):
        for modifier in part.get("ViewModifierCodeSequence") or ():
            meaning = str(modifier.get("CodeMeaning") or "")
            if _names_other_view(meaning):
                return None, f"ViewModifierCodeSequence {meaning} is neither frontal nor lateral"
    for item in items:
        coded, meaning = _coded_view(item), str(item.get("CodeMeaning") or "")
        if coded is None and _names_other_view(meaning):
            return None, f"ViewCodeSequence {meaning} is neither frontal nor lateral"
        if view and coded and view != coded:
            return None, f"ViewPosition {position} and ViewCodeSequence {meaning} contradict each other"
        view = view or coded
    return view, ""


def described_view(header: pydicom.Dataset) -> ViewName | None:
    """The view by a description, or else by the plane of PatientOrientation."""
    for name in DESCRIPTIONS:
        view = view_in_words(str(header.get(name) or ""))
        if view:
            return view
    letters = {str(letters)[:1].upper() for letters in header.get("PatientOrientation") or ()}
    if len(letters) == 2 and letters & set("HF"):
        return "frontal" if letters & set("LR") else "lateral" if letters & set("AP") else None
    return None


def rank(header: pydicom.Dataset) -> int:
    """The place of an image among those of its view in a study: itself, computed from another one, not for display."""
    if str(header.get("PresentationIntentType") or "").strip().upper() == "FOR PROCESSING":
        return 2
    kinds = str(header.get("ImageType") or "")
    texts = (kinds, *(str(header.get(name) or "") for name in ("SeriesDescription", "DerivationDescription")))
    words = set().union(*map(_words, texts))
    return int("secondary" in _words(kinds) or any(COMPANION.fullmatch(word) for word in words))


def view_in_words(text: str) -> ViewName | None:
    """The view that a text names, if it is the only one and no view that is neither."""
    words = _words(text)
    views = {WORDS[word] for word in words & WORDS.keys()}
    return views.pop() if len(views) == 1 and not _names_other_view(text) else None


def _names_other_view(text: str) -> bool:
    """Whether a text has a word of a view that is neither frontal nor lateral, or negates one of these."""
    return bool(NEGATED.search(text)) or any(OTHER_VIEWS.fullmatch(word) for word in _words(text))


def _coded_view(item: pydicom.Dataset) -> ViewName | None:
    code = Code(str(item.get("CodeValue") or ""), str(item.get("CodingSchemeDesignator") or ""), "")
    for view, known in CODES.items():
        if code in known:
            return view
    return view_in_words(str(item.get("CodeMeaning") or ""))


def _words(text: str) -> set[str]:
    """Words in lower case; `postero-anterior` is one, and so is `p.a.`"""
    joined = re.sub(r"(postero|antero)[- ]", r"\1", text.lower())
    joined = re.sub(r"(?<![a-z])(p\. ?a|a\. ?p)(?![a-z])", lambda match: match[0][0] + match[0][-1], joined)
    return set(re.split(r"[^a-z]+", joined))
