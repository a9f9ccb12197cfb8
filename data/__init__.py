"""The table of datasets: name in an option file -> "module:Class", imported when it is built."""

DATASETS = {
    "VideoRecurrentTrainDataset": "data.video:VideoRecurrentTrainDataset",
    "VideoRecurrentTrainNonblindDenoisingDataset": "data.video:VideoRecurrentTrainNonblindDenoisingDataset",
    "VideoRecurrentTrainVimeoDataset": "data.vimeo:VideoRecurrentTrainVimeoDataset",
    "VideoRecurrentTrainVimeoVFIDataset": "data.vimeo:VideoRecurrentTrainVimeoVFIDataset",
    "VideoRecurrentTestDataset": "data.video:VideoRecurrentTestDataset",
    "SingleVideoRecurrentTestDataset": "data.video:SingleVideoRecurrentTestDataset",
    "VideoTestVimeo90KDataset": "data.vimeo:VideoTestVimeo90KDataset",
    "VFI_DAVIS": "data.vimeo:VFI_DAVIS",
    "VFI_UCF101": "data.vimeo:VFI_UCF101",
    "VFI_Vimeo90K": "data.vimeo:VFI_Vimeo90K",
    "ImageTrainDataset": "data.images:ImageTrainDataset",
    "ImageTestDataset": "data.images:ImageTestDataset",
    "VideoSequenceDataset": "data.images:VideoSequenceDataset",
    "SyntheticImageDataset": "data.synthetic:SyntheticImageDataset",
    "SyntheticVideoDataset": "data.synthetic:SyntheticVideoDataset",
    "StyleDataset": "data.styles:StyleDataset",
    "StyleTestDataset": "data.styles:StyleTestDataset",
    "StrokeDataset": "data.strokes:StrokeDataset",
    "MaskTrainDataset": "data.masks:MaskTrainDataset",
    "MaskTestDataset": "data.masks:MaskTestDataset",
}
