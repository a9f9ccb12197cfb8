"""The table of losses: name in an option file -> "module:Class", imported when it is built."""

LOSSES = {
    "l1": "losses.pixel:L1Loss",
    "l2": "losses.pixel:L2Loss",
    "l2sum": "losses.pixel:L2SumLoss",
    "ssim": "losses.pixel:SSIMLoss",
    "charbonnier": "losses.pixel:CharbonnierLoss",
    "lpips": "losses.lpips:LPIPS",
    "vqperceptual": "losses.vqperceptual:VQLPIPSWithDiscriminator",
    "VQLPIPSWithDiscriminator": "losses.vqperceptual:VQLPIPSWithDiscriminator",
    "lgt_energy": "losses.energy:GeometricFreeEnergyLoss",
    "patch_swd": "losses.energy:PatchSlicedWassersteinLoss",
    "cosine_ssm": "losses.energy:CosineSSMLoss",
    "structural": "losses.stroke:StructuralPretrainLoss",
    "dense": "losses.stroke:DenseLoss",
    "tanimoto": "losses.tanimoto:TanimotoLoss",
    "tanimoto_pooled": "losses.tanimoto:PooledTanimotoLoss",
    "dice": "losses.tanimoto:DiceLoss",
    "bce": "losses.tanimoto:CrossEntropyLoss",
}
