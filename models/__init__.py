"""Models and networks by the name an option file uses; imported when asked for."""

MODELS = {
    "plain": "models.model_plain:ModelPlain",
    "vrt": "models.model_vrt:ModelVRT",
    "lgt": "models.model_lgt:ModelLGT",
    "inktrace": "models.model_inktrace:ModelInkTrace",
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
}
