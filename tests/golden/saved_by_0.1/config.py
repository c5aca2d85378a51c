auto_scale_lr = dict(base_batch_size=16, enable=False)
crop_size = (
    512,
    512,
)
custom_hooks = [
    dict(type="mmvssm.ReproducibleResumeHook"),
    dict(type="mmvssm.NonFiniteGuardHook"),
    dict(type="mmvssm.InterruptionHook"),
    dict(type="mmvssm.UnfinishedValidationHook"),
]
custom_imports = dict(
    allow_failed_imports=False,
    imports=[
        "mmvssm",
    ],
)
data_preprocessor = dict(
    _scope_="mmseg",
    bgr_to_rgb=True,
    mean=[
        123.675,
        116.28,
        103.53,
    ],
    pad_val=0,
    seg_pad_val=255,
    std=[
        58.395,
        57.12,
        57.375,
    ],
    type="SegDataPreProcessor",
)
data_root = "data/shapes/"
dataset_type = "ADE20KDataset"
default_hooks = dict(
    checkpoint=dict(
        _scope_="mmseg",
        by_epoch=False,
        interval=1,
        max_keep_ckpts=2,
        type="mmvssm.AtomicCheckpointHook",
    ),
    logger=dict(_scope_="mmseg", interval=20, log_metric_by_epoch=False, type="LoggerHook"),
    param_scheduler=dict(_scope_="mmseg", type="ParamSchedulerHook"),
    sampler_seed=dict(_scope_="mmseg", type="DistSamplerSeedHook"),
    timer=dict(_scope_="mmseg", type="IterTimerHook"),
    visualization=dict(_scope_="mmseg", draw=True, interval=10, type="SegVisualizationHook"),
)
default_scope = "mmseg"
env_cfg = dict(
    cudnn_benchmark=True,
    dist_cfg=dict(backend="nccl"),
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
)
image_size = 160
img_ratios = [
    0.75,
    1.0,
    1.25,
]
launcher = "none"
load_from = None
log_level = "INFO"
log_processor = dict(by_epoch=False)
max_iters = 1800
metainfo = dict(
    classes=(
        "background",
        "disk",
        "square",
        "triangle",
        "star",
        "ring",
    ),
    palette=[
        (
            0,
            0,
            0,
        ),
        (
            230,
            60,
            60,
        ),
        (
            60,
            180,
            75,
        ),
        (
            60,
            110,
            230,
        ),
        (
            240,
            200,
            40,
        ),
        (
            170,
            80,
            220,
        ),
    ],
)
model = dict(
    _scope_="mmseg",
    auxiliary_head=dict(
        align_corners=False,
        channels=2,
        concat_input=False,
        dropout_ratio=0.1,
        in_channels=16,
        in_index=2,
        loss_decode=dict(loss_weight=0.4, type="CrossEntropyLoss", use_sigmoid=False),
        norm_cfg=dict(requires_grad=True, type="BN"),
        num_classes=6,
        num_convs=1,
        type="FCNHead",
    ),
    backbone=dict(
        arch=dict(
            depths=[
                1,
                1,
                1,
                1,
            ],
            embed_dims=[
                16,
                16,
                16,
                16,
            ],
            mlp_ratios=[
                1,
                1,
                1,
                1,
            ],
            stem_hidden_dim=4,
        ),
        drop_path_rate=0.0,
        out_indices=(
            0,
            1,
            2,
            3,
        ),
        type="mmvssm.GroupMamba",
    ),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            123.675,
            116.28,
            103.53,
        ],
        pad_val=0,
        seg_pad_val=255,
        size=(
            160,
            160,
        ),
        std=[
            58.395,
            57.12,
            57.375,
        ],
        type="SegDataPreProcessor",
    ),
    decode_head=dict(
        align_corners=False,
        channels=2,
        dropout_ratio=0.1,
        in_channels=[
            16,
            16,
            16,
            16,
        ],
        in_index=[
            0,
            1,
            2,
            3,
        ],
        loss_decode=dict(loss_weight=1.0, type="CrossEntropyLoss", use_sigmoid=False),
        norm_cfg=dict(requires_grad=True, type="BN"),
        num_classes=6,
        pool_scales=(
            1,
            2,
            3,
            6,
        ),
        type="UPerHead",
    ),
    pretrained=None,
    test_cfg=dict(mode="whole"),
    train_cfg=dict(),
    type="EncoderDecoder",
)
norm_cfg = dict(_scope_="mmseg", requires_grad=True, type="BN")
num_classes = 6
optim_wrapper = dict(
    _scope_="mmseg",
    clip_grad=dict(max_norm=10.0),
    optimizer=dict(
        betas=(
            0.9,
            0.999,
        ),
        lr=0.003,
        type="AdamW",
        weight_decay=0.01,
    ),
    paramwise_cfg=dict(
        custom_keys=dict(A_logs=dict(decay_mult=0.0), Ds=dict(decay_mult=0.0)), norm_decay_mult=0.0
    ),
    type="OptimWrapper",
)
optimizer = dict(_scope_="mmseg", lr=0.01, momentum=0.9, type="SGD", weight_decay=0.0005)
param_scheduler = [
    dict(begin=0, by_epoch=False, end=50, start_factor=0.01, type="LinearLR"),
    dict(begin=50, by_epoch=False, end=1800, eta_min=0.0, power=1.0, type="PolyLR"),
]
prepare_data = None
randomness = dict(seed=0)
resume = False
test_cfg = dict(_scope_="mmseg", type="TestLoop")
test_dataloader = dict(
    batch_size=4,
    dataset=dict(
        _scope_="mmseg",
        data_prefix=dict(img_path="val2017", seg_map_path="semantic_val2017"),
        data_root="shapes/",
        img_suffix=".png",
        metainfo=dict(
            classes=(
                "background",
                "disk",
                "square",
                "triangle",
                "star",
                "ring",
            ),
            palette=[
                (
                    0,
                    0,
                    0,
                ),
                (
                    230,
                    60,
                    60,
                ),
                (
                    60,
                    180,
                    75,
                ),
                (
                    60,
                    110,
                    230,
                ),
                (
                    240,
                    200,
                    40,
                ),
                (
                    170,
                    80,
                    220,
                ),
            ],
        ),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(
                keep_ratio=True,
                scale=(
                    160,
                    160,
                ),
                type="Resize",
            ),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
        type="BaseSegDataset",
    ),
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_scope_="mmseg", shuffle=False, type="DefaultSampler"),
    worker_init_fn=dict(type="mmvssm.init_worker"),
)
test_evaluator = dict(
    _scope_="mmseg",
    iou_metrics=[
        "mIoU",
    ],
    type="IoUMetric",
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        keep_ratio=True,
        scale=(
            160,
            160,
        ),
        type="Resize",
    ),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_cfg = dict(_scope_="mmseg", max_iters=2, type="IterBasedTrainLoop", val_interval=2)
train_dataloader = dict(
    batch_sampler=dict(batch_sampler=None, drop_last=False, type="mmvssm.ResumableBatchSampler"),
    batch_size=2,
    dataset=dict(
        _scope_="mmseg",
        data_prefix=dict(img_path="train2017", seg_map_path="semantic_train2017"),
        data_root="shapes/",
        img_suffix=".png",
        metainfo=dict(
            classes=(
                "background",
                "disk",
                "square",
                "triangle",
                "star",
                "ring",
            ),
            palette=[
                (
                    0,
                    0,
                    0,
                ),
                (
                    230,
                    60,
                    60,
                ),
                (
                    60,
                    180,
                    75,
                ),
                (
                    60,
                    110,
                    230,
                ),
                (
                    240,
                    200,
                    40,
                ),
                (
                    170,
                    80,
                    220,
                ),
            ],
        ),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(
                keep_ratio=True,
                ratio_range=(
                    0.8,
                    1.25,
                ),
                scale=(
                    160,
                    160,
                ),
                type="RandomResize",
            ),
            dict(
                crop_size=(
                    160,
                    160,
                ),
                type="RandomCrop",
            ),
            dict(prob=0.5, type="RandomFlip"),
            dict(type="PackSegInputs"),
        ],
        type="BaseSegDataset",
    ),
    num_workers=0,
    persistent_workers=False,
    sampler=dict(
        sampler=dict(_scope_="mmseg", shuffle=True, type="InfiniteSampler"),
        type="mmvssm.SeededSampler",
    ),
    worker_init_fn=dict(type="mmvssm.init_worker"),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(
        keep_ratio=True,
        ratio_range=(
            0.8,
            1.25,
        ),
        scale=(
            160,
            160,
        ),
        type="RandomResize",
    ),
    dict(
        crop_size=(
            160,
            160,
        ),
        type="RandomCrop",
    ),
    dict(prob=0.5, type="RandomFlip"),
    dict(type="PackSegInputs"),
]
tta_model = dict(_scope_="mmseg", type="SegTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        _scope_="mmseg",
        transforms=[
            [
                dict(
                    keep_ratio=True,
                    scale=(
                        120,
                        120,
                    ),
                    type="Resize",
                ),
                dict(
                    keep_ratio=True,
                    scale=(
                        160,
                        160,
                    ),
                    type="Resize",
                ),
                dict(
                    keep_ratio=True,
                    scale=(
                        200,
                        200,
                    ),
                    type="Resize",
                ),
            ],
            [
                dict(direction="horizontal", prob=0.0, type="RandomFlip"),
                dict(direction="horizontal", prob=1.0, type="RandomFlip"),
            ],
            [
                dict(type="LoadAnnotations"),
            ],
            [
                dict(type="PackSegInputs"),
            ],
        ],
        type="TestTimeAug",
    ),
]
val_cfg = dict(_scope_="mmseg", type="ValLoop")
val_dataloader = dict(
    batch_size=4,
    dataset=dict(
        _scope_="mmseg",
        data_prefix=dict(img_path="val2017", seg_map_path="semantic_val2017"),
        data_root="shapes/",
        img_suffix=".png",
        metainfo=dict(
            classes=(
                "background",
                "disk",
                "square",
                "triangle",
                "star",
                "ring",
            ),
            palette=[
                (
                    0,
                    0,
                    0,
                ),
                (
                    230,
                    60,
                    60,
                ),
                (
                    60,
                    180,
                    75,
                ),
                (
                    60,
                    110,
                    230,
                ),
                (
                    240,
                    200,
                    40,
                ),
                (
                    170,
                    80,
                    220,
                ),
            ],
        ),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(
                keep_ratio=True,
                scale=(
                    160,
                    160,
                ),
                type="Resize",
            ),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
        type="BaseSegDataset",
    ),
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_scope_="mmseg", shuffle=False, type="DefaultSampler"),
    worker_init_fn=dict(type="mmvssm.init_worker"),
)
val_evaluator = dict(
    _scope_="mmseg",
    iou_metrics=[
        "mIoU",
    ],
    type="IoUMetric",
)
vis_backends = [
    dict(_scope_="mmseg", type="LocalVisBackend"),
]
visualizer = dict(
    _scope_="mmseg",
    name="visualizer",
    type="SegLocalVisualizer",
    vis_backends=[
        dict(type="LocalVisBackend"),
    ],
)
work_dir = "run"
