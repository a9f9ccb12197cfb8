"""The tables of models and networks: name in an option file -> "module:Class", imported when it is built."""

# Lower-case names of models, networks and datasets in KAIR's option files that have no counterpart here.
KAIR_ONLY = {
    "gan", "plain2", "plain4", "dncnn", "fdncnn", "ffdnet", "srmd", "dpsr", "dnsr", "msrresnet0", "msrresnet1", "rrdb",
    "rrdbnet", "imdn", "usrnet", "usrgan", "drunet", "swinir", "rvrt", "bsrnet", "bsrgan", "blindsr",
    "discriminator_unet", "discriminator_patchgan", "discriminator_vgg_96", "discriminator_vgg_128",
    "discriminator_vgg_128_sn", "discriminator_vgg_192", "l", "low-quality", "input-only", "denoising", "dnpatch",
    "denoising-noiselevel", "denoising-noiselevelmap", "sr", "super-resolution", "dpir", "jpeg", "plain", "plainpatch",
}

MODELS = {
    "plain": "models.model_plain:ModelPlain",
    "vrt": "models.model_vrt:ModelVRT",
    "lgt": "models.model_lgt:ModelLGT",
    "inktrace": "models.model_inktrace:ModelInkTrace",
    "vqgan": "models.model_vqgan:ModelVQGAN",
    "VQGAN": "models.model_vqgan:ModelVQGAN",
    "taming_vqgan": "models.model_vqgan:ModelVQGAN",
    "TamingVQGAN": "models.model_vqgan:ModelVQGAN",
    "emavq": "models.model_vqgan:ModelVQGAN",
    "EMAVQ": "models.model_vqgan:ModelVQGAN",
    "gumbelvq": "models.model_vqgan:ModelVQGAN",
    "GumbelVQ": "models.model_vqgan:ModelVQGAN",
    "vqvae": "models.model_vqgan:ModelVQGAN",
    "VqVae": "models.model_vqgan:ModelVQGAN",
    "vqvae2": "models.model_vqgan:ModelVQGAN",
    "VQVAE2": "models.model_vqgan:ModelVQGAN",
    "segmentation": "models.model_segmentation:ModelSegmentation",
}

NETWORKS = {
    "vrt": "models.network_vrt:VRT",
    "spynet": "models.network_spynet:SpyNet",
    "vqmodel": "models.network_vqgan:VQModel",
    "VQModel": "models.network_vqgan:VQModel",
    "vqgan": "models.network_vqgan:VQModel",
    "VQGAN": "models.network_vqgan:VQModel",
    "taming_vqgan": "models.network_vqgan:VQModel",
    "TamingVQGAN": "models.network_vqgan:VQModel",
    "emavq": "models.network_vqgan:EMAVQ",
    "EMAVQ": "models.network_vqgan:EMAVQ",
    "gumbelvq": "models.network_vqgan:GumbelVQ",
    "GumbelVQ": "models.network_vqgan:GumbelVQ",
    "vqvae": "models.network_vqvae:VqVae",
    "VqVae": "models.network_vqvae:VqVae",
    "vqvae2": "models.network_vqvae:VQVAE2",
    "VQVAE2": "models.network_vqvae:VQVAE2",
    "inktrace": "models.network_inktrace:UnifiedModel",
    "nlayer_discriminator": "models.network_discriminator:NLayerDiscriminator",
    "lgt": "models.network_lgt:LGTUNet",
    "LGTUNet": "models.network_lgt:LGTUNet",
    "resuneta": "models.network_resuneta:ResUNetA",
}
