"""Codebooks: the values of 4-bit and 8-bit codes, as in bitsandbytes."""

from __future__ import annotations

import base64
import zlib

import numpy as np

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""Quantiles of the normal distribution (QLoRA, arXiv 2305.14314); code 7 is exactly zero."""

# bitsandbytes' FP4, not the E2M1 of QLoRA's table, which errs less (0.106 instead of 0.122 on
# normal weights): files have to mean here what they mean there.
_FP4_HALF = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], np.float32)

FP4 = np.concatenate([_FP4_HALF, 0 - _FP4_HALF])  # both zeros are +0
"""Sign, two exponent bits and one mantissa bit, divided by the maximum; codes 0 and 8 are zero."""

FOUR_BIT = {"nf4": NF4, "fp4": FP4}
"""``bnb_4bit_quant_type`` → the values of the 16 codes."""

ASCENDING = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}
"""The codes in ascending order of value; of FP4's two zeros, 0 is that of values not above 0."""


def midpoints(values: np.ndarray) -> np.ndarray:
    """The float32 midpoints between neighbours in a sorted table."""
    return ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)


THRESHOLDS = {name: midpoints(table[ASCENDING[name]]) for name, table in FOUR_BIT.items()}


def _dynamic_map() -> np.ndarray:
    # The published formula's rounding depends on bitsandbytes' torch, so the values are stored: the
    # 128 positive ones of 256, little-endian float32. The others are 0 and their negatives.
    compressed = (
        "c-jrjUr1A77zXg;zk*p^R1*tyNrGXB;F)ea-}in8Wfubp{{%v|K|(td8B9_Tlw?u!ViglI=}fwC3q-}hdEpdOLP>"
        "-(4MKKN5wi<L11S^@M1Ag__xHR!v+--yLpNJ%&hoNt7wQr=YtUw&*$><6E%WyL^leAp_AAHptyM=>AWQlDr&tMga"
        "7FAqP|mzP%KQB><z)P?QjsWP?noUA`+e+Z=>Y3~^NwB4o@5_7KQZ=egMGWV#X1%a*t54eJY`(sg}DX%F|%-2M&Zk"
        "c?c5T2$vu%6kLq(g9skPBAGdjP@)W&^d|Cm8_DU$;SwYK(cFOcRNs=1L5_(8v@{uR<g!-=cQ_6UO9HzadLEOV+N{"
        ">)fAEk2l7$u9R$dyS@I-bPdA|2gX!R8uS<?q-!CQUPmlu;;TxlBa$Y9UEZp=r&qN3ej<^{21_VU=IQhww8Z3?l}c"
        "KtByj!j@oPVC%3=*bmrm*e>j!sFMG~CDkx;R8706N>aWW)vu^l`Kp>S%&;4<BG@fhDXa{37gh<Yg4MtrFoM;>oT@"
        "ClVD+#D*nL<FtQF>gwZXiwc9<U)fOWxoV7;(@<e+*E`xeI3"
    )
    upper = np.frombuffer(zlib.decompress(base64.b85decode(compressed)), "<f4").astype(np.float32)
    return np.concatenate([-upper[-2::-1], np.zeros(1, np.float32), upper])


DYNAMIC_MAP = _dynamic_map()
"""bitsandbytes' signed 8-bit map of [-1, 1] (dynamic tree quantization, arXiv 1511.04561)."""

DYNAMIC_THRESHOLDS = midpoints(DYNAMIC_MAP)


def _unsigned_map() -> np.ndarray:
    # Stored for the same reason: the values above 0, as four planes of little-endian bytes.
    compressed = (
        "c-mVv!{S@u)w~5646|mY7<!-be6lE6sW8Am;QfX5eR*uADP9jN1eQBoH*Y#GmA2`x*VKo46-W8kh5TIL`g)SNR{G"
        "*c{p-)Z=GJsiZ(n@4fT3T0z3thU*VSCJG<LXOPygO7y4d)UR^bi?j|tc1)7O8qYdtF(v*fjL^<nOyS&uXs(#{&6V"
        "K7OXg-pyeKAXlc%lHf)V&<$gV}>)c(o7i6;w8=yAQ-ASXP@zTDpdGF!hLt}>&TFRrOFHC&-MCnpX_jFJK7j$%~SO"
        "<;+W~;&I8}|)8<~`ajx3*QX#_qah=q*z_*<-X$4h>+|LAFk9nB(y5OrV!=YApt~33CBG+fe$UR(~rtx}RfpJxgts"
        "KL{LyKF}+%>pfpIO&m5NIs&_4<yPRWS@{XMo-}PMe8L%mjN7KOy;SbAu1%1jD)jzDf5)njgyh*G*e@l+Ceb_Recx"
        "IK<UVor4k!>Zb0x&m^K|=^a<l*fn|Xvh_O-oxXDS*@vHutX%xU5;BVVZm}h;6X&ehy#Lg-hi`u{aqtRD%ByG@m{~"
        "iz`vyhCrDW!pRyQ=ab@ud4oHBjZ+y#r5u2{Wp<Cg8a_Uu1&^u*~ak3Rfo;}exp)-tkmaQ6#~P022*YG`Ti?w>Sm="
        "G=u#R;*sXdE2hN2aldObN=%6TlXG5efj3Y=kLG&F*32Rad2_-@(T)!h)GDv$jU1!tEy>e>FDVj8k?G1SlQS)I6Aw"
        "!dwTi!1q20$hDS!n#3dx9q^4(P=jIg@m6VlNR@c@yn3$TGnVFlLTY!Nj1Xv*fYiz&<JFq1O*pUP5sRRHRo|K6"
    )
    planes = np.frombuffer(zlib.decompress(base64.b85decode(compressed)), np.uint8).reshape(4, -1)
    above = np.ascontiguousarray(planes.T).view("<f4").reshape(-1).astype(np.float32)
    return np.concatenate([np.zeros(1, np.float32), above])


UNSIGNED_MAP = _unsigned_map()
"""bitsandbytes' 8-bit map of [0, 1]."""

# With plain midpoints one parameter of a heavy-tailed trial ended 84 away from 32-bit AdamW's, with
# these 0.06.
UNSIGNED_THRESHOLDS = np.concatenate([np.zeros(1, np.float32), midpoints(UNSIGNED_MAP)[1:]])
"""Midpoints, but no value above 0 gets the code of 0, as it does in bitsandbytes: with a second
moment of 0 and a first moment that is not, Adam's next step would divide by epsilon."""
