"""Formula, null and case of no value of every layer measure, for its page; a test holds the catalog against it.

Data flow: name of a measure -> ``Fact`` -> ``measures.page``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """What the page says of a measure beside the catalog's words.

    Args:
        source: Function or class that computes it, relative to lightning_mm.
        formula: In plain text.
        null: The value that chance, or no effect, gives.
        undefined: When there is no value, beside vectors that are not finite.
    """

    source: str
    formula: str
    null: str
    undefined: str


_PROBE = "one class only; a class in too few pictures for the folds; constant features"
_PAIR = "all samples coincide; fewer than 4 samples"
_FEW_TRACES = "no question qualifies"


def _probe(formula: str, null: str) -> Fact:
    return Fact("probes.probe.probe", formula, null, _PROBE)


_ACCURACY = "share of held-out rows classified rightly by a linear probe, 5 folds over whole pictures"

FACTS = {
    "entailment/hard": _probe(_ACCURACY, "share of the most frequent class"),
    "entailment/random": _probe(_ACCURACY, "share of the most frequent class"),
    "global_minus_local": Fact(
        "analysis.probing.run_probes",
        "(e − e₀)/(1 − e₀) − (o − o₀)/(1 − o₀) of entailment/random e and objects o with their nulls e₀, o₀",
        "0",
        "either probe is undefined in that layer",
    ),
    "objects": _probe("mean over objects of the area under the ROC curve of held-out rows", "0.5, band by permutation"),
    "object_at_patches": _probe(_ACCURACY, "share of the most frequent class"),
    "position": _probe(_ACCURACY, "share of the most frequent class"),
    "count": _probe(_ACCURACY, "share of the most frequent class"),
    "overlap": Fact(
        "geometry.knn_overlap.overlap",
        "mean over samples i of |Nₐ(i) ∩ N_b(i)| / k, the k nearest neighbors in either representation",
        "k/(N−1); drawn by re-pairing pictures where several samples share one",
        "all samples coincide; fewer than k+1 neighbors known",
    ),
    "cka": Fact("geometry.cka.cka", "HSIC₁(K, L) / √(HSIC₁(K, K) · HSIC₁(L, L))", "0", _PAIR),
    "cka_rbf": Fact(
        "geometry.cka.cka_rbf",
        "debiased CKA with the kernel exp(−d²/2σ²), σ the layer's median distance",
        "0",
        "more than half of the samples coincide; fewer than 4 samples",
    ),
    "cka_biased": Fact("geometry.cka.cka_biased", "‖XᵀY‖² / (‖XᵀX‖ · ‖YᵀY‖)", "tr K · tr L / ((N−1) ‖K‖ ‖L‖)", _PAIR),
    "svcca": Fact(
        "geometry.cca.svcca",
        "mean canonical correlation of the directions that hold most variance, at most N/10 of a side",
        "mean over random pairings",
        _PAIR,
    ),
    "pwcca": Fact(
        "geometry.cca.pwcca",
        "canonical correlations weighted by Σⱼ |⟨h, xⱼ⟩| of their variate h",
        "mean over random pairings",
        _PAIR,
    ),
    "procrustes": Fact(
        "geometry.procrustes.procrustes",
        "‖XᵀY‖₊ / (‖X‖ · ‖Y‖), with the nuclear norm ‖·‖₊",
        "expected nuclear norm of unrelated data with these spectra",
        "all samples coincide; fewer than 3 samples",
    ),
    "distance_correlation": Fact(
        "geometry.distance_correlation.distance_correlation",
        "√(⟨A, B⟩ / √(⟨A, A⟩ · ⟨B, B⟩)) of doubly centered distances of rows of length 1",
        "mean over random pairings",
        "all distances are equal",
    ),
    "id_correlation": Fact(
        "geometry.id_correlation.id_correlation",
        "(d_a + d_b - d_ab) / max(d_a, d_b), dimensions by TwoNN; d_ab of both side by side, features at variance 1",
        "mean over random pairings",
        "fewer than 20 samples with two distinct neighbors",
    ),
    "rsa": Fact(
        "geometry.rsa.rsa",
        "Spearman correlation of the distances of all pairs of samples",
        "0, band of random pairings (Mantel)",
        "all distances are equal; fewer than 4 samples",
    ),
    "matched_cosine": Fact(
        "geometry.modality_gap.matched_cosine",
        "mean cosine of matching pairs − mean cosine of mismatched pairs",
        "0, band of random pairings",
        "a sample is zero; one group only, so that no two samples are different",
    ),
    "token_cosine": Fact(
        "geometry.modality_gap.token_cosine",
        "median cosine of matching pairs, one random token of each",
        "median over random pairs",
        "a sample is zero",
    ),
    "imbalance_image_to_text": Fact(
        "geometry.information_imbalance.information_imbalance",
        "Δ(image → text) = 2/N · mean rank in the text of the nearest neighbor in the image",
        "1",
        "all samples coincide; ties by index among the neighbors",
    ),
    "imbalance_text_to_image": Fact(
        "geometry.information_imbalance.information_imbalance",
        "Δ(text → image) = 2/N · mean rank in the image of the nearest neighbor in the text",
        "1",
        "all samples coincide; ties by index among the neighbors",
    ),
    "alignment": Fact(
        "geometry.modality_gap.alignment",
        "mean ‖xᵢ − yᵢ‖² of matching unit rows",
        "the same of random pairs",
        "a sample is zero",
    ),
    "gap": Fact(
        "geometry.modality_gap.modality_gap",
        "‖mean of the picture's unit rows − mean of the caption's‖",
        "the modalities of random samples swapped",
        "a sample is zero; too few groups to swap (no null)",
    ),
    "gap_auc": Fact(
        "geometry.separability.separability",
        "area under the ROC curve of a ridge classifier of the modality, on samples it was not trained on",
        "0.5, band by swapping the modalities of random samples",
        "fewer than 10 samples; no digits left in the products of the rows",
    ),
    "frechet": Fact(
        "geometry.divergence.frechet",
        "‖μₐ − μ_b‖² + tr(Sₐ + S_b − 2 (Sₐ^½ S_b Sₐ^½)^½) in the joint leading components",
        "the modalities of random samples swapped",
        _PAIR,
    ),
    "mmd": Fact(
        "geometry.divergence.mmd",
        "mean over i ≠ j of k(aᵢ, aⱼ) + k(bᵢ, bⱼ) − k(aᵢ, bⱼ) − k(bᵢ, aⱼ), Gaussian k",
        "0, band by swaps",
        "more than half of the samples coincide; fewer than 4 samples",
    ),
    "id_gride": Fact(
        "geometry.intrinsic_dimension.gride",
        "maximum likelihood of (r₁/r₂)^d ~ Beta(n₁, n₂ − n₁) for the distances of neighbors n₁ = 16, n₂ = 32 "
        "(nearer ones where N < 256)",
        "the same of isotropic noise with N and D",
        "fewer than 20 distinct samples with n₂ distinct neighbors; ties",
    ),
    "id_calibrated": Fact(
        "geometry.intrinsic_dimension.calibrated_dimension",
        "dimension of the Gaussian cloud of N samples that gets the same GRIDE estimate",
        "isotropic noise with N and D",
        "id_gride is undefined, or above the calibration curve",
    ),
    "id_twonn": Fact(
        "geometry.intrinsic_dimension.two_nn",
        "slope of −ln(1 − F) on ln(r₂/r₁), from the smallest ratios",
        "the same of isotropic noise with N and D",
        "fewer than 20 distinct samples; ties",
    ),
    "participation_ratio": Fact(
        "geometry.spectrum.participation_ratio",
        "(Σλ)² / Σλ², debiased by U-statistics",
        "the same of isotropic noise",
        "no variance beyond that of noise; fewer than 4 samples",
    ),
    "effective_rank": Fact(
        "geometry.spectrum.effective_rank", "exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ/Σσ", "the same of isotropic noise", _PAIR
    ),
    "rankme": Fact(
        "geometry.spectrum.rankme",
        "effective rank of the uncentered data, 10⁻⁷ added to each share",
        "the same of isotropic noise",
        _PAIR,
    ),
    "alpha_req": Fact(
        "geometry.spectrum.alpha_req",
        "α of λⱼ ~ j^−α: minus the slope of ln λⱼ on ln j",
        "the same of isotropic noise",
        "too few eigenvalues above zero for a line",
    ),
    "entropy": Fact(
        "geometry.spectrum.entropy",
        "−Σ pᵢ ln pᵢ / ln min(N, D), pᵢ = λᵢ/Σλ",
        "the same of isotropic noise",
        _PAIR,
    ),
    "entropy_unit_rows": Fact(
        "geometry.spectrum.entropy",
        "entropy, with the centered rows brought to length 1 first",
        "that of isotropic noise with as many samples and features",
        "all samples coincide",
    ),
    "anisotropy": Fact(
        "geometry.isotropy.anisotropy",
        "(‖Σ unit rows‖² − N) / (N(N−1))",
        "0, band of isotropic directions",
        "a sample is zero",
    ),
    "uniformity": Fact(
        "geometry.isotropy.uniformity",
        "ln mean exp(−t ‖xᵢ − xⱼ‖²) over pairs of unit rows",
        "uniform distribution on the sphere: −2t + ln ₀F₁(; D/2; t²)",
        "a sample is zero",
    ),
    "label_overlap": Fact(
        "geometry.knn_overlap.label_overlap",
        "share of the k nearest that carry the sample's own label",
        "Σ_c n_c(n_c − 1) / (N(N−1))",
        "all samples carry one label; fewer than 3 pictures with one kind of object",
    ),
    "block_influence": Fact(
        "geometry.block_influence.block_influence",
        "1 − mean cos(h_l, h_{l+1})",
        "none",
        "the embeddings, which no block has made; a sample is zero",
    ),
    "angular_distance": Fact(
        "geometry.block_influence.angular_distance",
        "mean arccos(cos(h_l, h_{l+1})) / π",
        "none",
        "the embeddings, which no block has made; a sample is zero",
    ),
    "drift_overlap": Fact(
        "analysis.drift.measure_drift",
        "overlap of the layer now with itself before the first step",
        "k/(N−1)",
        "all samples coincide",
    ),
    "drift_cka": Fact("analysis.drift.measure_drift", "debiased linear CKA with the start", "0", _PAIR),
    "drift_procrustes": Fact(
        "analysis.drift.measure_drift",
        "Procrustes similarity with the start",
        "unrelated data with these spectra",
        "all samples coincide; fewer than 3 samples",
    ),
    "drift_cosine": Fact(
        "geometry.block_influence.row_cosine", "mean cosine of a sample now and before", "none", "a sample is zero"
    ),
    "drift_id": Fact(
        "analysis.drift.measure_drift", "id_gride now − id_gride before", "0", "id_gride is undefined at either time"
    ),
    "drift_weights": Fact(
        "study.layers.weight_drift",
        "‖W now − W at the start‖ / ‖W at the start‖ over all tensors of a block, adapters multiplied out",
        "0",
        "nothing",
    ),
    "flow": Fact(
        "causal.effects.attention_flow.flow_shares",
        "Σ over sources j of ‖Σ_h A_ij v_j W_O^h‖ / the same over all tokens j, mean over the targets i",
        "every visible token contributes equally",
        "no layer attends to the tokens; " + _FEW_TRACES,
    ),
    "knockout": Fact(
        "causal.effects.knockout_curves.knockout_curves",
        "(p with the edge cut − p) / p, the answer's probability p",
        "0",
        "the edge does not exist in the questions; " + _FEW_TRACES,
    ),
    "knockout_accuracy": Fact(
        "causal.effects.knockout_curves.knockout_curves",
        "share of answers whose first token stays the most likely one with the edge cut",
        "1, the answers as they were",
        _FEW_TRACES,
    ),
    "knockout_kl": Fact(
        "causal.effects.knockout_curves.knockout_curves", "KL(p ‖ p with the edge cut), in nats", "0", _FEW_TRACES
    ),
    "ablation": Fact(
        "causal.effects.layer_ablation.ablation_curves",
        "(p with the part ablated − p) / p; a lower bound, for later layers compensate",
        "0",
        _FEW_TRACES,
    ),
    "transplant": Fact(
        "causal.effects.layer_transplant.transplant_rows",
        "share of conversations that the starting model answers rightly with these layers of the tuned one",
        "the starting model's accuracy",
        "no conversation of that modality",
    ),
    "trace": Fact(
        "causal.effects.activation_patching.CausalTrace",
        "(p restored − p corrupted) / (p clean − p corrupted)",
        "0",
        "the corruption lowers the answer's probability by less than 0.05",
    ),
    "trace_effect": Fact(
        "causal.effects.aggregate.average_traces",
        "mean over all traced questions of p restored − p corrupted, the quantity of Basu et al. 2024",
        "0",
        _FEW_TRACES,
    ),
    "trace_ratio": Fact(
        "causal.effects.aggregate.ratios_of_means",
        "mean of p restored − p corrupted over mean of p clean − p corrupted, over all traced questions",
        "0",
        "the mean of p clean − p corrupted is not clear of 0",
    ),
    "trace_restored": Fact(
        "causal.effects.aggregate.average_traces",
        "mean over all traced questions of p restored",
        "mean p corrupted",
        _FEW_TRACES,
    ),
    "score": Fact(
        "layer_selection.layer_range_search.combine_criteria",
        "mean of the standardized criteria, weighted by reliability and family",
        "0",
        "no criterion is reliable",
    ),
}
